# SPDX-License-Identifier: Apache-2.0
"""Who may call what: bearer tokens from a file.

A line of the file is `NAME TOKEN [admin] [priority=N]`, where TOKEN may be
`sha256:` and the hex digest of the token, so that the file need not hold it.
Tokens of one name are one tenant's. N is the smallest priority that its
requests may have: by default 0, so that nobody is served before others, and for
an administrator any. Lines that are empty or begin with # say nothing. A change
of the file counts from the next call on; one that can't be read leaves the
tokens as they were.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
import contextvars
import dataclasses
import hashlib
import hmac
import pathlib
import re
from typing import Any

import grpc

from sarathi_jax import errors
from sarathi_jax.server.guard import renewed

_PREFIX = 'sha256:'
_SCHEME = 'bearer '
_FORM = 'NAME TOKEN [admin] [priority=N]'
_MORE = re.compile(
  r'(?P<admin>admin)?(?:(?:^| )priority=(?P<priority>-?\d{1,10}))?'
)


@dataclasses.dataclass(frozen=True, slots=True)
class Token:
  """One token.

  Attributes:
    name: the tenant whose it is.
    digest: its SHA-256, hexadecimal.
    is_admin: whether it may control the server, and abort anybody's requests.
    min_priority: the smallest priority that its requests may have; None for
      any.
  """

  name: str
  digest: str
  is_admin: bool
  min_priority: int | None


# The token that the current call came with; set by `Interceptor`.
CURRENT: contextvars.ContextVar[Token | None] = contextvars.ContextVar(
  'token', default=None
)


def parse(text: str, path: str) -> tuple[Token, ...]:
  """Reads the lines of a file of tokens.

  Raises:
    ConfigError: a line is malformed, or there is no token.
  """
  tokens = []
  for number, line in enumerate(text.splitlines(), 1):
    words = line.split()
    if not words or words[0].startswith('#'):
      continue
    match = _MORE.fullmatch(' '.join(sorted(words[2:])))
    if len(words) < 2 or match is None:
      raise errors.ConfigError(
        f'{path}, line {number}: must be {_FORM}, N an integer.'
      )
    digest = (
      words[1].removeprefix(_PREFIX).lower()
      if words[1].startswith(_PREFIX)
      else _digest(words[1])
    )
    if len(digest) != hashlib.sha256().digest_size * 2:
      raise errors.ConfigError(
        f'{path}, line {number}: {_PREFIX} must be followed by 64 hex digits.'
      )
    is_admin, priority = match['admin'] is not None, match['priority']
    tokens.append(
      Token(
        words[0],
        digest,
        is_admin,
        int(priority) if priority else (None if is_admin else 0),
      )
    )
  if not tokens:
    raise errors.ConfigError(f'{path}: has no token.')
  return tuple(tokens)


class Tokens:
  """The tokens of a file, as it is now.

  Raises:
    ConfigError: the file can't be read when this is made.
  """

  def __init__(self, path: pathlib.Path) -> None:
    self._path = path
    self._tokens = renewed.Renewed('The tokens', (path,), self._read)

  def find(self, secret: str) -> Token | None:
    """Finds the token of a secret; compares all, so that time tells nothing."""
    digest = _digest(secret)
    found = None
    for token in self._tokens.get():
      if hmac.compare_digest(token.digest.encode(), digest.encode()):
        found = token
    return found

  def of_header(self, authorization: str) -> Token | None:
    """Finds the token of an authorization header, `Bearer TOKEN`."""
    if not authorization.lower().startswith(_SCHEME):
      return None
    return self.find(authorization[len(_SCHEME) :].strip())

  def _read(self) -> tuple[Token, ...]:
    try:
      return parse(self._path.read_text(), str(self._path))
    except (OSError, UnicodeDecodeError) as error:
      raise errors.ConfigError(
        f"auth_tokens={str(self._path)!r}: can't be read: {error}."
      ) from error


class Interceptor(grpc.aio.ServerInterceptor):
  """Lets through calls with a token.

  Args:
    tokens: the known tokens.
    open_services: services that need no token, as probes have none.
    admin_services: services, or methods, that need an administrator's token.
  """

  def __init__(
    self,
    tokens: Tokens,
    open_services: Collection[str],
    admin_services: Collection[str],
  ) -> None:
    self._tokens = tokens
    self._open = open_services
    self._admin = admin_services

  async def intercept_service(
    self,
    continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
    handler_call_details: grpc.HandlerCallDetails,
  ) -> Any:
    method = handler_call_details.method
    service = method.split('/')[1]
    if service in self._open:
      return await continuation(handler_call_details)
    token = self._token(handler_call_details)
    if token is None:
      return await _refuse(
        continuation,
        handler_call_details,
        grpc.StatusCode.UNAUTHENTICATED,
        'needs a token that the server knows: "authorization: Bearer TOKEN".',
      )
    guarded = {service, method} & {*self._admin}
    if guarded and not token.is_admin:
      return await _refuse(
        continuation,
        handler_call_details,
        grpc.StatusCode.PERMISSION_DENIED,
        f'{guarded.pop().strip("/")}: needs the token of an administrator.',
      )
    CURRENT.set(token)
    return await continuation(handler_call_details)

  def _token(self, details: grpc.HandlerCallDetails) -> Token | None:
    for key, value in details.invocation_metadata or ():
      if key == 'authorization' and isinstance(value, str):
        return self._tokens.of_header(value)
    return None


async def _refuse(
  continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
  details: grpc.HandlerCallDetails,
  code: grpc.StatusCode,
  message: str,
) -> Any:
  """Returns a handler of the same kind, whose every call ends with `code`."""
  handler = await continuation(details)
  if handler is None:
    return None

  async def refuse(request: Any, context: Any) -> None:
    await context.abort(code, message)

  kind = (
    f'{"stream" if handler.request_streaming else "unary"}_'
    f'{"stream" if handler.response_streaming else "unary"}'
  )
  make = getattr(grpc, f'{kind}_rpc_method_handler')
  return make(refuse, handler.request_deserializer, handler.response_serializer)


def _digest(secret: str) -> str:
  return hashlib.sha256(secret.encode()).hexdigest()
