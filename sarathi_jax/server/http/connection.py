# SPDX-License-Identifier: Apache-2.0
"""One connection of HTTP: uvicorn's, with bounds on bytes and time.

uvicorn takes headers of any length, waits for ever for a request to come whole
and for a client to read, takes any number of pipelined requests, tells only the
last of them that their client left, and answers to what is no request in the
middle of another answer. The parser is httptools', in C: h11, in Python, holds
this thread, which all share, 300 ms for 256 KiB of a body in chunks of a byte,
60 times as long, and adds 20 us to each event of a stream.
"""

from __future__ import annotations

import asyncio
from typing import Any

from absl import logging
from uvicorn.protocols.http import httptools_impl

from sarathi_jax.server.http import errors as http_errors
from sarathi_jax.server.http import exchange

_MOST_HEAD = 2**16  # bytes of a request's line and headers, and of trailers
_MOST_HEADERS = 128
_MOST_CHUNKS = 4096  # of a body, beside one for each 256 bytes of it
_HEAD_S = 30.0  # in which a request's line and headers are to be here
WRITE_S = 60.0  # in which a client is to read some of what waits for it
_NO_REQUEST = 400, 'Bad Request', 'this is no request of HTTP/1.1.'
_MANY_CHUNKS = 400, 'Bad Request', 'the body comes in too many chunks.'
_LONG_HEAD = (
  431,
  'Request Header Fields Too Large',
  'the headers are too long, or too many.',
)
_FULL = 503, 'Service Unavailable', 'there are too many connections.'


class Connection(httptools_impl.HttpToolsProtocol):
  """One connection.

  Attributes:
    most_connections: at once.
    most_pipelined: requests that wait for the one before them.
    most_body: bytes of a body.
  """

  most_connections: int
  most_pipelined: int
  most_body: int

  def __init__(self, *args: Any, **kwargs: Any) -> None:
    super().__init__(*args, **kwargs)
    # Bytes that came since a request ended, or some of a body was here.
    self._num_head = 0
    self._num_unwanted = 0  # bytes that nobody is to have
    self._num_bytes = self._num_chunks = 0  # of a body
    self._in_head = True
    self._takes_more = True  # requests, once those that are here are answered
    self._problem = _NO_REQUEST  # why the parser stops
    self._timer: asyncio.TimerHandle | None = None  # for a head to be here
    self._writing: asyncio.TimerHandle | None = None
    self._cycles: list[httptools_impl.RequestResponseCycle] = []

  def connection_made(self, transport: Any) -> None:
    super().connection_made(transport)
    if len(self.connections) > self.most_connections:
      logging.log_every_n_seconds(
        logging.WARNING,
        'A connection is refused: max_connections=%d.',
        10,
        self.most_connections,
      )
      self._refuse(*_FULL, 'retry-after: 1')
    else:
      self._expect_head()

  def connection_lost(self, exc: Exception | None) -> None:
    for timer in (self._timer, self._writing):
      if timer is not None:
        timer.cancel()
    for cycle in self._cycles:
      if not cycle.response_complete:
        cycle.disconnected = True
        cycle.message_event.set()
    super().connection_lost(exc)

  def data_received(self, data: bytes) -> None:
    if not self._takes_more:
      self._count_unwanted(len(data))
      return
    if self._in_head and self._timer is None:
      self._expect_head()
    self._num_head += len(data)
    super().data_received(data)
    if self._num_head > _MOST_HEAD:
      self._problem = _LONG_HEAD
      self.send_400_response('')

  def on_message_begin(self) -> None:
    self._in_head = True
    super().on_message_begin()

  def on_header(self, name: bytes, value: bytes) -> None:
    super().on_header(name, value)
    if len(self.headers) > _MOST_HEADERS:
      self._problem = _LONG_HEAD
      raise ValueError('too many headers')

  def on_headers_complete(self) -> None:
    self._in_head = False
    if self._timer is not None:
      self._timer.cancel()
      self._timer = None
    if len(self.pipeline) >= self.most_pipelined:
      self._in_head = True  # of one that is not taken
      raise ValueError('too many requests')
    super().on_headers_complete()
    self._cycles = [*self._unanswered(), self.cycle]

  def on_body(self, body: bytes) -> None:
    self._num_head = 0
    self._num_bytes += len(body)
    self._num_chunks += 1
    if self._num_chunks > _MOST_CHUNKS + self._num_bytes // 256:
      self._problem = _MANY_CHUNKS
      raise ValueError('too many chunks')
    if self.cycle.response_complete:
      # It is read, so that its client reads the answer; but not for ever.
      self._count_unwanted(len(body))
    super().on_body(body)

  def on_message_complete(self) -> None:
    self._num_head = self._num_unwanted = 0
    self._num_bytes = self._num_chunks = 0
    self._in_head = True
    super().on_message_complete()

  def pause_writing(self) -> None:
    super().pause_writing()
    self._writing = self.loop.call_later(WRITE_S, self.transport.abort)

  def resume_writing(self) -> None:
    if self._writing is not None:
      self._writing.cancel()
      self._writing = None
    super().resume_writing()

  def send_400_response(self, msg: str) -> None:
    """Answers to what is no request, or is not taken, unless others wait."""
    del msg  # uvicorn's, which knows one problem
    waiting = self._unanswered()
    if self.transport.is_closing():
      return
    if waiting and self._in_head:
      self._takes_more = False
      waiting[-1].keep_alive = False
    elif not waiting or (len(waiting) == 1 and not waiting[0].response_started):
      self._refuse(*self._problem)
    else:
      self.transport.abort()

  def _unanswered(self) -> list[httptools_impl.RequestResponseCycle]:
    return [c for c in self._cycles if not c.response_complete]

  def _count_unwanted(self, num: int) -> None:
    """Reads on, so that a client reads its answers; but not for ever."""
    self._num_unwanted += num
    if self._num_unwanted > self.most_body:
      self.transport.abort()

  def _expect_head(self) -> None:
    self._timer = self.loop.call_later(_HEAD_S, self.transport.close)

  def _refuse(
    self, status: int, phrase: str, message: str, *headers: str
  ) -> None:
    body = exchange.encode(http_errors.body_of(status, message))
    lines = (
      f'HTTP/1.1 {status} {phrase}',
      'content-type: application/json',
      f'content-length: {len(body)}',
      'connection: close',
      *headers,
    )
    self.transport.write('\r\n'.join(lines).encode() + b'\r\n\r\n' + body)
    self.transport.close()
