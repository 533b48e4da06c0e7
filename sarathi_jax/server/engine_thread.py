# SPDX-License-Identifier: Apache-2.0
"""The one thread that makes, owns and steps the engine.

  event loop, any thread                      engine thread
  submit(request) -> Stream   --- inbox -->   engine.add
  Stream.close(), abort(ids)  --- inbox -->   engine.abort
                                              engine.step() -> deltas
  Stream.__anext__   <-- one callback a step, with all its deltas --

Every request that `submit` took ends in exactly one way: its last delta, an
error, or being closed by its reader. The thread sleeps on a condition while
the engine is idle. Imports no gRPC and no JAX.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
import concurrent.futures
import functools
import threading
from typing import NamedTuple, TypeVar

from absl import logging

from sarathi_jax import errors
from sarathi_jax import types
from sarathi_jax.engine import engine as engine_lib

T = TypeVar('T')


class Stream:
  """What one request gains, in order; read by one task of the event loop.

  Iteration ends after the delta with a finish_reason. It raises what `add`
  refused the request with, or EngineDeadError.
  """

  def __init__(self, request: types.Request,
               abandon: Callable[[Stream], None]) -> None:
    self.request = request
    self._abandon = abandon
    self._items: asyncio.Queue[types.OutputDelta | Exception] = asyncio.Queue()
    self._ended = False

  def put(self, item: types.OutputDelta | Exception) -> None:
    """Adds a delta, or the error that ends the stream; on the event loop."""
    self._items.put_nowait(item)

  def __aiter__(self) -> Stream:
    return self

  async def __anext__(self) -> types.OutputDelta:
    if self._ended:
      raise StopAsyncIteration
    item = await self._items.get()
    if isinstance(item, Exception):
      self._ended = True
      raise item
    self._ended = item.finish_reason is not None
    return item

  def close(self) -> None:
    """Aborts the request unless it has ended. May be called again."""
    if not self._ended:
      self._ended = True
      self._abandon(self)


class _Command(NamedTuple):
  """What the engine thread shall do between two steps. Neither raises."""

  run: Callable[[engine_lib.Engine], None]
  fail: Callable[[Exception], None]  # instead of `run`: the engine is gone


class EngineThread:
  """Runs an engine for an event loop.

  Args:
    make_engine: called on the engine's thread, so that one thread does all
      that the engine does, from loading on.
    loop: runs the readers of streams, and `on_death`.
    on_death: told what `step` raised. The thread is over then: every request
      got EngineDeadError, and so does whoever submits another one.
  """

  def __init__(self, make_engine: Callable[[], engine_lib.Engine],
               loop: asyncio.AbstractEventLoop,
               on_death: Callable[[BaseException], None]) -> None:
    self._make_engine = make_engine
    self._loop = loop
    self._on_death = on_death
    self._ready: concurrent.futures.Future[engine_lib.Engine] = (
      concurrent.futures.Future())
    self._wakeup = threading.Condition()  # guards the next three
    self._inbox: list[_Command] = []
    self._stopping = False
    # Makes errors for those who come too late; None while it goes on.
    self._gone: Callable[[], errors.EngineDeadError] | None = None
    # The engine thread's own. Deltas are routed here, not by request id on
    # the event loop, where one of a request just closed could still reach
    # another that took over its id.
    self._streams: dict[str, Stream] = {}
    self._outgoing: list[tuple[Stream, types.OutputDelta | Exception]] = []
    # Not joined at exit: a second signal must not wait for a long step.
    self._thread = threading.Thread(
      target=self._run, name='engine', daemon=True)

  def start(self) -> Awaitable[engine_lib.Engine]:
    """Starts to make the engine; the result is the engine, once it is warm.

    Use only `check`, `clock`, `info` and `tokenizer` of it.
    """
    self._ready.set_running_or_notify_cancel()  # can't be cancelled from now
    self._thread.start()
    return asyncio.wrap_future(self._ready, loop=self._loop)

  def submit(self, request: types.Request) -> Stream:
    """Hands in a request; any thread. Its stream tells if it was refused."""
    stream = Stream(request, self._close)
    self._send(_Command(functools.partial(self._add, stream),
                        functools.partial(self._post_now, stream)))
    return stream

  async def abort(self, request_ids: Sequence[str]) -> list[str]:
    """Aborts requests, whose streams end with ABORT; returns those found."""
    return await self.call(functools.partial(self._abort, request_ids))

  async def call(self, function: Callable[[engine_lib.Engine], T]) -> T:
    """Runs a function of the engine between two steps.

    Raises:
      EngineDeadError: the engine has stopped.
    """
    result: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run(engine: engine_lib.Engine) -> None:
      if result.set_running_or_notify_cancel():
        try:
          result.set_result(function(engine))
        except Exception as error:
          result.set_exception(error)

    def fail(error: Exception) -> None:
      if result.set_running_or_notify_cancel():
        result.set_exception(error)

    self._send(_Command(run, fail))
    return await asyncio.wrap_future(result)

  def stop(self) -> None:
    """Ends the thread after its step; what is left gets EngineDeadError then,
    and whoever submits another request at once."""
    with self._wakeup:
      self._stopping = True
      self._wakeup.notify()

  def join(self, timeout_s: float) -> bool:
    """Waits for the end of the thread; returns whether it came."""
    if self._thread.ident is not None:
      self._thread.join(timeout_s)
    return not self._thread.is_alive()

  def _send(self, command: _Command) -> None:
    with self._wakeup:
      gone = self._gone
      if self._stopping and gone is None:
        gone = functools.partial(gone_error, None)
      if gone is None:
        self._inbox.append(command)
        self._wakeup.notify()
    if gone is not None:
      command.fail(gone())

  def _close(self, stream: Stream) -> None:
    self._send(_Command(functools.partial(self._drop, stream),
                        lambda error: None))

  # What follows runs on the engine's thread.

  def _run(self) -> None:
    try:
      engine = self._make_engine()
      self._ready.set_result(engine)
      while (commands := self._receive(wait=not engine.has_work)) is not None:
        for command in commands:
          command.run(engine)
        self._flush()  # refusals need not wait for a step
        for delta in engine.step():
          self._route(delta)
        self._flush()
    except BaseException as fault:
      # Whatever it was: no reader may wait for ever.
      self._end(fault)
    else:
      self._end(None)

  def _receive(self, wait: bool) -> list[_Command] | None:
    """Takes what was sent; None if the thread shall end."""
    with self._wakeup:
      while wait and not self._inbox and not self._stopping:
        self._wakeup.wait()
      if self._stopping:
        return None
      commands, self._inbox = self._inbox, []
      return commands

  def _add(self, stream: Stream, engine: engine_lib.Engine) -> None:
    try:
      engine.add(stream.request)
    except Exception as error:
      self._outgoing.append((stream, error))
    else:
      self._streams[stream.request.request_id] = stream

  def _drop(self, stream: Stream, engine: engine_lib.Engine) -> None:
    # A stream whose id was refused as a duplicate must not end the other.
    request_id = stream.request.request_id
    if self._streams.get(request_id) is stream:
      engine.abort(request_id)
      del self._streams[request_id]

  def _abort(self, request_ids: Sequence[str],
             engine: engine_lib.Engine) -> list[str]:
    found = [i for i in request_ids if i in self._streams and engine.abort(i)]
    for request_id in found:
      self._route(types.OutputDelta(
        request_id, '', (), (), types.FinishReason.ABORT))
    return found

  def _route(self, delta: types.OutputDelta) -> None:
    stream = self._streams.get(delta.request_id)
    if stream is None:
      return  # its reader left between the step and its delta
    if delta.finish_reason is not None:
      del self._streams[delta.request_id]
    self._outgoing.append((stream, delta))

  def _flush(self) -> None:
    if self._outgoing:
      outgoing, self._outgoing = self._outgoing, []
      self._on_loop(_put_all, outgoing)

  def _post_now(self, stream: Stream, error: Exception) -> None:
    self._on_loop(stream.put, error)

  def _on_loop(self, function: Callable[..., None], *args: object) -> None:
    try:
      self._loop.call_soon_threadsafe(function, *args)
    except RuntimeError:
      if not self._loop.is_closed():  # else nobody is left to hear of it
        raise

  def _end(self, fault: BaseException | None) -> None:
    gone = functools.partial(gone_error, fault)
    with self._wakeup:
      self._gone = gone
      commands, self._inbox = self._inbox, []
    for command in commands:
      command.fail(gone())
    self._outgoing += [(s, gone()) for s in self._streams.values()]
    self._streams.clear()
    self._flush()
    if not self._ready.done():  # an error of make_engine is its caller's
      self._ready.set_exception(fault or gone())
    elif fault is not None:
      logging.error('The engine stopped.', exc_info=fault)
      self._on_loop(self._on_death, fault)


def _put_all(
    outgoing: list[tuple[Stream, types.OutputDelta | Exception]]) -> None:
  for stream, item in outgoing:
    stream.put(item)


def gone_error(fault: BaseException | None) -> errors.EngineDeadError:
  """Makes the end of a stream of an engine that stopped, of itself or by a
  fault. A new one for every reader, as raising an exception changes it."""
  if fault is None:
    return errors.EngineDeadError('the server is shutting down')
  error = errors.EngineDeadError(
    f'the engine stopped after a fault: {type(fault).__name__}: {fault}')
  error.__cause__ = fault
  return error
