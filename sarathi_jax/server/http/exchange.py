# SPDX-License-Identifier: Apache-2.0
"""One request of HTTP and its response, over ASGI.

Starlette's own responses are not used for streams: they would be given up
without a word when a task that reads them is cancelled, and pass each event
through several generators.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
import contextlib
import json
from typing import Any

from starlette import datastructures
from starlette import types as asgi

from sarathi_jax import errors
from sarathi_jax.server import frontend as frontend_lib
from sarathi_jax.server.guard import auth
from sarathi_jax.server.guard import caller as caller_lib
from sarathi_jax.server.guard import limits as limits_lib
from sarathi_jax.server.http import body as body_lib
from sarathi_jax.server.http import errors as http_errors
from sarathi_jax.server.protocols import messages

BODY_S = 60.0  # in which a body is to be here
REQUEST_ID = 'x-request-id'
_JSON = 'application/json'
_encoder = json.JSONEncoder(separators=(',', ':'))
_EVENTS = 'text/event-stream; charset=utf-8'


# From so many bytes on, the encoder in C would hold the interpreter for long.
_LONG = 65_536


def encode(content: Any, size: int = 0) -> bytes:
  """Returns JSON, as short as it is.

  Args:
    content: what to encode.
    size: about how many bytes that takes, if they may be many.
  """
  if size > _LONG:
    return ''.join(_encoder.iterencode(content)).encode()
  return _encoder.encode(content).encode()


class Room:
  """The bytes that bodies which are being read may have together.

  Args:
    most: so many.
  """

  def __init__(self, most: float) -> None:
    self._most = most
    self._num = 0

  def take(self, num: int) -> None:
    """Takes some; CapacityError if there are not so many."""
    self._num += num
    if self._num > self._most:
      raise errors.CapacityError(
        'the bodies that are being read have more than max_bodies_mib='
        f'{self._most / 2**20:g} MiB; try again in 1 s.'
      )

  def give_back(self, num: int) -> None:
    """Gives back what was taken, in vain or not."""
    self._num -= num


class Exchange:
  """One request, and what it is answered.

  Args:
    scope, receive, send: ASGI's.
    room: for its body.
    token: the token that it came with, if any.

  Attributes:
    names: the fields that its body has, or should have.
    has_begun: whether some of the response is sent.
  """

  def __init__(
    self,
    scope: asgi.Scope,
    receive: asgi.Receive,
    send: asgi.Send,
    room: Room,
    token: auth.Token | None,
  ) -> None:
    self.headers = datastructures.Headers(scope=scope)
    self.path_params: Mapping[str, Any] = scope.get('path_params', {})
    self.names: set[str] = set()
    self.has_begun = False
    self._client = scope.get('client')
    self._receive, self._send = receive, send
    self._room, self._token = room, token
    self._beginning = asyncio.Lock()
    self._is_gone = False

  @property
  def request_id(self) -> str | None:
    """The id that the client gave its request, if it did."""
    return self.headers.get(REQUEST_ID) or None

  @property
  def is_admin(self) -> bool:
    """Whether an administrator asks; without tokens, whoever does is one."""
    return self._token is None or self._token.is_admin

  def caller(self, user: str = '') -> frontend_lib.Caller:
    """Returns who asks; `user` tells apart clients that call for others."""
    host = self._client[0] if self._client else ''
    address = f'ipv6:%5B{host}%5D' if ':' in host else f'ipv4:{host}'
    named = {**self.headers}
    names = [name for name in (named.get(caller_lib.CLIENT_ID), user) if name]
    named[caller_lib.CLIENT_ID] = '/'.join(names)
    return caller_lib.of_metadata(named, self._token, address)

  async def read(self, limits: limits_lib.Limits) -> tuple[dict[str, Any], int]:
    """Returns the JSON object that the body is, and its size in bytes.

    Raises:
      HttpError: it is too long, takes too long, or is something else.
      InvalidRequestError: it is not JSON, or has too many parts.
      CapacityError: others' bodies take all room.
    """
    self._check_type()
    parts: list[bytes] = []
    try:
      async with asyncio.timeout(BODY_S):
        await self._read(round(limits.max_message_mib * 2**20), parts)
      data = b''.join(parts)
      fields = await messages.read(
        len(data), lambda: body_lib.parse(data, limits)
      )
    except TimeoutError:
      raise http_errors.HttpError(
        408, f'body: was not here after {BODY_S:g} s.', connection='close'
      ) from None
    finally:
      self._room.give_back(sum(map(len, parts)))
    self.names.update(fields)
    return fields, len(data)

  def _check_type(self) -> None:
    kind = self.headers.get('content-type', _JSON)
    if kind.partition(';')[0].strip().lower() != _JSON:
      raise http_errors.HttpError(
        415, f'content-type={errors.shown(kind)}: must be {_JSON}.'
      )
    if (coding := self.headers.get('content-encoding')) is not None:
      raise http_errors.HttpError(
        415, f'content-encoding={errors.shown(coding)}: is not supported.'
      )

  async def _read(self, most: int, parts: list[bytes]) -> None:
    """Adds to `parts` what comes of a body."""
    said = self.headers.get('content-length', '0')
    num = int(said) if said.isascii() and said.isdigit() else 0
    is_last = num > most
    num = num if is_last else 0
    while not is_last:
      message = await self._receive()
      if message['type'] == 'http.disconnect':
        raise asyncio.CancelledError
      parts.append(message.get('body', b''))
      num += len(parts[-1])
      self._room.take(len(parts[-1]))
      is_last = num > most or not message.get('more_body', False)
    if num > most:
      raise http_errors.HttpError(
        413,
        f'body: has more than {most:,} bytes: must be at most max_message_mib='
        f'{most / 2**20:g} MiB.',
      )

  @contextlib.asynccontextmanager
  async def while_connected(self) -> AsyncIterator[None]:
    """Cancels what is inside when the client leaves; the body is read."""
    task = asyncio.current_task()
    assert task is not None

    async def watch() -> None:
      while (await self._receive())['type'] != 'http.disconnect':
        pass
      self._is_gone = True
      task.cancel()

    watching = asyncio.create_task(watch())
    try:
      yield
    finally:
      watching.cancel()

  def forgive(self) -> bool:
    """Whether the task was cancelled as the client left; it goes on then."""
    task = asyncio.current_task()
    if self._is_gone and task is not None:
      task.uncancel()
    return self._is_gone

  async def reply(
    self,
    content: Any,
    status: int = 200,
    headers: Mapping[str, str] | None = None,
  ) -> None:
    """Sends a whole response, as JSON."""
    await self.reply_bytes(encode(content), status, headers)

  async def reply_bytes(
    self,
    data: bytes,
    status: int = 200,
    headers: Mapping[str, str] | None = None,
  ) -> None:
    """Sends a whole response that is JSON already."""
    self.has_begun = True
    said = {'content-length': str(len(data)), **(headers or {})}
    await self._send(self._start(status, _JSON, said))
    await self._send({'type': 'http.response.body', 'body': data})

  async def write(self, event: bytes, *, is_last: bool = False) -> None:
    """Sends an event of a stream; the first one begins the response.

    Waits if the client reads too slowly. Several tasks may call it.
    """
    if not self.has_begun:
      async with self._beginning:
        if not self.has_begun:
          await self._send(
            self._start(200, _EVENTS, {'cache-control': 'no-cache'})
          )
          self.has_begun = True
    await self._send(
      {'type': 'http.response.body', 'body': event, 'more_body': not is_last}
    )

  def _start(
    self, status: int, kind: str, headers: Mapping[str, str]
  ) -> asgi.Message:
    said = {'content-type': kind, **headers}
    if self.request_id is not None and status == 200:
      said[REQUEST_ID] = self.request_id
    return {
      'type': 'http.response.start',
      'status': status,
      'headers': [
        (name.encode('latin-1'), value.encode('latin-1'))
        for name, value in said.items()
      ],
    }
