# SPDX-License-Identifier: Apache-2.0
"""Maps what an engine raises to the status and the words a client gets."""

from __future__ import annotations

from collections.abc import AsyncIterator
import contextlib
import math
from typing import Any

from absl import logging
import grpc

from sarathi_jax import errors

# The first that fits. Anything else is a defect of ours: INTERNAL.
CODES: tuple[tuple[type[Exception], grpc.StatusCode], ...] = (
  (errors.NotFoundError, grpc.StatusCode.NOT_FOUND),
  (errors.ForbiddenError, grpc.StatusCode.PERMISSION_DENIED),
  (errors.ExpiredError, grpc.StatusCode.OUT_OF_RANGE),
  (errors.InvalidRequestError, grpc.StatusCode.INVALID_ARGUMENT),
  (errors.ConfigError, grpc.StatusCode.INVALID_ARGUMENT),  # new weights
  (errors.CapacityError, grpc.StatusCode.RESOURCE_EXHAUSTED),
  (errors.MissedError, grpc.StatusCode.DATA_LOSS),
  (errors.DeadlineError, grpc.StatusCode.DEADLINE_EXCEEDED),
  (errors.StepError, grpc.StatusCode.INTERNAL),
  (errors.EngineDeadError, grpc.StatusCode.UNAVAILABLE),
)


# Characters of a message. Trailers are dropped beyond 8 KiB, and the client
# sees another status; one character may take 12 bytes there.
_MAX_CHARS = 500


def of(error: Exception) -> tuple[grpc.StatusCode, str]:
  """Returns the code and the message for a client, cut if it is long."""
  for kind, code in CODES:
    if isinstance(error, kind):
      return code, message_of(error)
  return grpc.StatusCode.INTERNAL, message_of(error)


def message_of(error: Exception) -> str:
  """Returns the message for a client, cut if it is long.

  Of a defect of ours it has the type alone: the message may quote anything.
  """
  if not isinstance(error, errors.SarathiError):
    return f'internal error, see the log of the server: {type(error).__name__}'
  text = errors.cut(str(error), _MAX_CHARS)
  # Lone surrogates, of JSON, can't be sent.
  return text.encode(errors='backslashreplace').decode()


def hints(error: Exception) -> tuple[tuple[str, str], ...]:
  """Returns trailing metadata that say when to try again.

  gRPC's own retries heed the first, people and proxies the second.
  """
  if not isinstance(error, errors.CapacityError):
    return ()
  return (
    ('grpc-retry-pushback-ms', f'{error.retry_after_s * 1e3:.0f}'),
    ('retry-after', f'{retry_after_s(error)}'),
  )


def retry_after_s(error: errors.CapacityError) -> int:
  """Returns when to try again, in whole seconds, as HTTP has it; >= 1."""
  return max(math.ceil(error.retry_after_s), 1)


def log_defect(error: Exception) -> None:
  """Logs an exception that is none of our errors, with its traceback."""
  if not isinstance(error, errors.SarathiError):
    logging.error('A call failed.', exc_info=error)


@contextlib.asynccontextmanager
async def reported(
  context: grpc.aio.ServicerContext[Any, Any],
) -> AsyncIterator[None]:
  """Ends a call with the status of the exception raised inside, if any."""
  try:
    yield
  except grpc.aio.AbortError:
    raise  # has its status
  except Exception as error:
    log_defect(error)
    await context.abort(*of(error), trailing_metadata=hints(error))
