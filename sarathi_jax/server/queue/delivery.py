# SPDX-License-Identifier: Apache-2.0
"""Hands output from the engine's thread to streams' readers; ends streams.

Imports no gRPC and no JAX.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator

from sarathi_jax import errors
from sarathi_jax import types
from sarathi_jax.server.queue import outbox

_Outgoing = tuple[outbox.Stream, types.OutputDelta | Exception]


class Delivery:
  """The streams of the requests that the engine has.

  Deltas are routed here, on the engine's thread. No other may use this.

  Args:
    loop: runs the readers of the streams.
  """

  def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
    self._loop = loop
    self._streams: dict[str, outbox.Stream] = {}
    self._outgoing: list[_Outgoing] = []

  def __len__(self) -> int:
    return len(self._streams)

  def __iter__(self) -> Iterator[outbox.Stream]:
    return iter(self._streams.values())

  def add(self, stream: outbox.Stream) -> None:
    """Adds the stream of a request that the engine was given."""
    self._streams[stream.request.key] = stream

  def remove(self, key: str) -> outbox.Stream | None:
    """Takes out the stream of a request that ended; None if it is not here."""
    return self._streams.pop(key, None)

  def route(self, delta: types.OutputDelta) -> outbox.Stream | None:
    """Keeps a delta for its stream until `flush`; returns the stream."""
    stream = self._streams.get(delta.request_id)
    if stream is None:
      return None  # its reader left between the step and its delta
    self.put(stream, delta)
    if delta.ends_request:
      self.remove(delta.request_id)
    return stream

  def put(
    self, stream: outbox.Stream, item: types.OutputDelta | Exception
  ) -> None:
    """Keeps a stream's next delta, or the error that ends it, until `flush`."""
    self._outgoing.append((stream, item))

  def flush(self) -> None:
    """Hands all that was kept to the event loop, by one callback."""
    if self._outgoing:
      outgoing, self._outgoing = self._outgoing, []
      call_on(self._loop, _put_all, outgoing)

  def end_all(
    self, waiting: Iterable[outbox.Stream], make_error: Callable[[], Exception]
  ) -> None:
    """Ends every stream, and those `waiting`, with an error of its own."""
    for stream in (*self._streams.values(), *waiting):
      self.put(stream, make_error())
    self._streams.clear()
    self.flush()


def call_on(
  loop: asyncio.AbstractEventLoop, function: Callable[..., None], *args: object
) -> None:
  """Has an event loop call a function, unless it is closed; any thread."""
  try:
    loop.call_soon_threadsafe(function, *args)
  except RuntimeError:
    if not loop.is_closed():  # else nobody is left to hear of it
      raise


def step_error(request_id: str, fault: Exception) -> errors.StepError:
  """Makes the error that ends the stream of a request whose step failed."""
  error = errors.StepError(
    f'{request_id}: a step that it was in failed: {type(fault).__name__}; '
    'see the log of the server.'
  )
  error.__cause__ = fault
  return error


def gone_error(fault: BaseException | None) -> errors.EngineDeadError:
  """Makes the error for a stream of an engine that stopped.

  Every reader gets a new one, as raising an exception changes it.

  Args:
    fault: what stopped the engine; None if it was shut down.
  """
  if fault is None:
    return errors.EngineDeadError('the server is shutting down')
  # No more than its name: a message may have paths, or what others sent.
  error = errors.EngineDeadError(
    f'the engine stopped after a fault: {type(fault).__name__}; see the log '
    'of the server.'
  )
  error.__cause__ = fault
  return error


def _put_all(outgoing: list[_Outgoing]) -> None:
  for stream, item in outgoing:
    stream.put(item)
