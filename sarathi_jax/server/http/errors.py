# SPDX-License-Identifier: Apache-2.0
"""Maps what an engine raises to a status of HTTP, and to OpenAI's words."""

from __future__ import annotations

from collections.abc import Collection, Mapping
import re
from typing import Any, NamedTuple

from sarathi_jax import errors
from sarathi_jax.server.protocols import status as status_lib

# The first that fits. Anything else is a defect of ours: 500.
STATUSES: tuple[tuple[type[Exception], int], ...] = (
  (errors.NotFoundError, 404),
  (errors.ForbiddenError, 403),
  (errors.InvalidRequestError, 400),
  (errors.ConfigError, 400),  # adapters
  (errors.CapacityError, 429),
  (errors.DeadlineError, 504),
  (errors.StepError, 500),
  (errors.EngineDeadError, 503),
)
# Status -> (type, code) of OpenAI's errors.
_KINDS: Mapping[int, tuple[str, str | None]] = {
  401: ('authentication_error', 'invalid_api_key'),
  403: ('permission_error', None),
  429: ('rate_limit_error', 'rate_limit_exceeded'),
}
# Errors begin with the name of a field: of its top, `messages[0].content`.
_NAME = re.compile(r'([^\W\d]\w*)[\w.\[\]]*[=:]')


class HttpError(Exception):
  """A request that is not even read.

  Args:
    status: of the response.
    message: for the client.
    headers: of the response.
  """

  def __init__(self, status: int, message: str, **headers: str) -> None:
    super().__init__(message)
    self.status = status
    self.headers = {
      name.replace('_', '-'): value for name, value in headers.items()
    }


class Told(NamedTuple):
  """What a client is told of an error."""

  status: int
  body: dict[str, Any]
  headers: Mapping[str, str]


def of(error: Exception, names: Collection[str] = ()) -> Told:
  """Returns what to tell of an error.

  Args:
    error: the error.
    names: the fields that a body has or has to have, of which the error may
      name one.
  """
  if isinstance(error, HttpError):
    return Told(
      error.status, body_of(error.status, str(error)), dict(error.headers)
    )
  status = next((s for kind, s in STATUSES if isinstance(error, kind)), 500)
  message = status_lib.message_of(error)
  headers = {}
  if isinstance(error, errors.CapacityError):
    headers = {
      'retry-after': f'{status_lib.retry_after_s(error)}',
      'retry-after-ms': f'{error.retry_after_s * 1e3:.0f}',
    }
  match = _NAME.match(message)
  param = match[1] if match and match[1] in names else None
  return Told(status, body_of(status, message, param), headers)


def body_of(
  status: int, message: str, param: str | None = None
) -> dict[str, Any]:
  """Returns an error as OpenAI writes it."""
  kind, code = _KINDS.get(
    status, ('server_error' if status >= 500 else 'invalid_request_error', None)
  )
  if status == 404 and param == 'model':
    code = 'model_not_found'
  return {
    'error': {'message': message, 'type': kind, 'param': param, 'code': code}
  }
