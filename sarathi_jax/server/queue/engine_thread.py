# SPDX-License-Identifier: Apache-2.0
"""The one thread that makes, owns and steps the engine.

  event loop, any thread                      engine thread
  submit(request) -> Stream   --- queue -->   engine.add, as there is room
  Stream.close(), abort(ids)  --- inbox -->   engine.abort
  call(function)              --- inbox -->   function(engine)
                                              engine.step() -> deltas
  Stream.__anext__   <-- one callback a step, with all its deltas --

Who waits is `admission`'s; how a delta or an error reaches its reader,
`delivery`'s; how a request ends before its time, `endings`'.

Every request that `submit` took ends in exactly one way: its last delta, an
error, or being closed by its reader. A step that fails ends the requests that
were in it, no others, as long as the device goes on. The thread sleeps on a
condition while there is nothing to do. Imports no gRPC and no JAX.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
import concurrent.futures
import functools
import threading
import time
from typing import NamedTuple, TypeVar

from absl import logging

from sarathi_jax import errors
from sarathi_jax import types
from sarathi_jax.engine import engine as engine_lib
from sarathi_jax.engine import state
from sarathi_jax.scheduler import page_log
from sarathi_jax.server.queue import admission
from sarathi_jax.server.queue import delivery
from sarathi_jax.server.queue import endings
from sarathi_jax.server.queue import outbox
from sarathi_jax.server.queue import pausing

# How long `fail` waits for the step under way, seconds.
_STEP_S = 1.0
# Steps that may fail one after the other before the engine is given up.
_MAX_FAULTS = 3

T = TypeVar('T')
_OnPages = Callable[[list[page_log.Event], state.Load], None]


class _Command(NamedTuple):
  """What the engine's thread shall do between two steps."""

  run: Callable[[engine_lib.Engine], None]  # raises what ends the engine
  fail: Callable[[Exception], None]  # instead of `run`: the engine is gone


class EngineThread:
  """Runs an engine for an event loop.

  Args:
    make_engine: called on the engine's thread, so that one thread does all
      that the engine does, from loading on.
    loop: runs the readers of streams, and `on_death`.
    on_death: told what ended the engine. The thread is over then: every
      request got EngineDeadError, and so does whoever submits another one.
    limits: the most that may wait.
  """

  def __init__(
    self,
    make_engine: Callable[[], engine_lib.Engine],
    loop: asyncio.AbstractEventLoop,
    on_death: Callable[[BaseException], None],
    limits: admission.Limits | None = None,
  ) -> None:
    self._make_engine = make_engine
    self._loop = loop
    self._on_death = on_death
    self._ready: concurrent.futures.Future[engine_lib.Engine] = (
      concurrent.futures.Future()
    )
    self._limits = limits or admission.Limits()
    self._wakeup = threading.Condition()  # guards what follows, to _gone
    self._inbox: list[_Command] = []
    self._waiting = admission.Queue(self._limits)
    self._stopping = False
    self._has_ended = False
    # Makes errors for those who come too late; None while it goes on.
    self._gone: Callable[[], errors.EngineDeadError] | None = None
    # The engine thread's own, what follows.
    self._streams = delivery.Delivery(loop)
    self._endings = endings.Endings(self._waiting, self._streams, self._wakeup)
    self._pause = pausing.Pause()
    # Who is told what becomes of pages, if anybody.
    self._on_pages: _OnPages | None = None
    self._told: state.Load | None = None
    self._num_faults = 0  # steps that failed since one went well
    self._step_began: float | None = None  # the one under way; read by any
    # Not joined at exit: a second signal must not wait for a long step.
    self._thread = threading.Thread(
      target=self._run, name='engine', daemon=True
    )

  def start(self) -> Awaitable[engine_lib.Engine]:
    """Starts to make the engine; the result is the engine, once it is warm.

    Use only `check`, `clock`, `info` and `tokenizer` of it.
    """
    self._ready.set_running_or_notify_cancel()  # can't be cancelled from now
    self._thread.start()
    return asyncio.wrap_future(self._ready, loop=self._loop)

  def submit(self, request: types.Request) -> outbox.Stream:
    """Submits a request, whose key has to be unique; any thread.

    Raises:
      CapacityError: too many wait.
      DeadlineError: its answer can't begin before its deadline.
      EngineDeadError: the engine has stopped.
    """
    stream = outbox.Stream(
      request,
      self._close,
      self._limits.max_outbox,
      self._limits.stream_interval_ms / 1e3,
    )
    self._wake(lambda: self._waiting.push(stream))
    return stream

  def check_room(self, num_outputs: int) -> None:
    """Raises CapacityError if there is no room for so many more; any thread."""
    with self._wakeup:
      self._waiting.check_room(num_outputs)

  @property
  def num_queued(self) -> int:
    """Number of outputs of requests that are not yet the engine's."""
    return self._waiting.num_outputs

  @property
  def num_queued_tokens(self) -> int:
    """Number of tokens of the prompts of queued requests."""
    return self._waiting.num_tokens

  @property
  def is_paused(self) -> bool:
    return self._pause.is_holding

  @property
  def is_up(self) -> bool:
    """Whether there is an engine that is made and has not stopped."""
    return self._ready.done() and self._is_gone() is None

  @property
  def step_s(self) -> float:
    """Seconds that the step under way has taken; 0 without one; any thread."""
    began = self._step_began
    return 0.0 if began is None else time.monotonic() - began

  async def pause(self, mode: pausing.PauseMode) -> None:
    """Begins no requests until `resume`; new ones wait in the queue.

    Args:
      mode: what becomes of those that are running. KEEP: they stop where
        they are. WAIT: they run to their end; this waits for it. ABORT:
        their streams end with ABORT.
    """
    idle: concurrent.futures.Future[None] = concurrent.futures.Future()

    def pause(engine: engine_lib.Engine) -> None:
      if mode is pausing.PauseMode.ABORT:
        running = frozenset(stream.request.key for stream in self._streams)
        self._endings.abort(lambda r: r.key in running, engine)
      self._pause.begin(mode, idle)

    await self.call(pause)
    await asyncio.wrap_future(idle)

  async def resume(self) -> None:
    """Ends a pause or a drain."""
    await self.call(lambda engine: self._pause.end())

  async def drain(self) -> None:
    """Begins no requests but those that a step has room for, until `resume`.

    The others end with EngineDeadError at once: they would wait in vain, and
    another server may have room. A pause ends, or what runs never would.
    """
    with self._wakeup:  # At once, however long the step under way takes.
      left_out = [] if self._waiting.has_room else self._waiting.take_all()
    for stream in left_out:
      stream.put(delivery.gone_error(None))
    await self.call(lambda engine: self._pause.end(is_draining=True))

  async def abort(
    self, request_ids: Collection[str], tenant: str | None
  ) -> list[str]:
    """Ends requests of a tenant, or of anybody if that is None, with ABORT;
    returns those found."""
    wanted = frozenset(request_ids)
    return await self.call(
      lambda engine: self._endings.abort(
        lambda r: r.request_id in wanted and tenant in (None, r.tenant), engine
      )
    )

  async def follow_pages(self, tell: _OnPages) -> None:
    """Tells what the prefix cache has, and from then on what becomes of it.

    With that, the engine's load is told, and whenever it has changed.

    Args:
      tell: called on the event loop; with what is there before this returns.

    Raises:
      UnsupportedError: the engine has no prefix cache, or no log of it.
    """

    def begin(engine: engine_lib.Engine) -> None:
      if engine.page_log is None:
        raise errors.UnsupportedError('prefix_cache: is off, or not told of.')
      there = engine.page_log.follow()
      delivery.call_on(self._loop, tell, there, engine.load())
      self._on_pages = tell

    await self.call(begin)

  async def call(self, function: Callable[[engine_lib.Engine], T]) -> T:
    """Runs a function of the engine between two steps.

    Raises:
      EngineDeadError: the engine has stopped; or the function raised it, which
        ends the engine.
    """
    result: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run(engine: engine_lib.Engine) -> None:
      if result.set_running_or_notify_cancel():
        try:
          result.set_result(function(engine))
        except Exception as error:
          result.set_exception(error)
          if isinstance(error, errors.EngineDeadError):
            raise

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

  def fail(self, fault: Exception) -> None:
    """Ends all with EngineDeadError, even if a step never ends; any thread.

    Args:
      fault: the reason, which another than the engine knows.
    """
    with self._wakeup:
      self._gone = functools.partial(delivery.gone_error, fault)
      self._stopping = True
      self._wakeup.notify()
    self.join(_STEP_S)  # Most steps end, if with an error.
    self._end(fault)

  def why_ended(self) -> str | None:
    """Tells if the thread ended without telling why; else None. Any thread."""
    is_gone = self._thread.ident is not None and not self._thread.is_alive()
    return 'its thread is gone' if is_gone and not self._has_ended else None

  def join(self, timeout_s: float) -> bool:
    """Waits for the end of the thread; returns whether it came."""
    if self._thread.ident is not None:
      self._thread.join(timeout_s)
    return not self._thread.is_alive()

  def _send(self, command: _Command) -> None:
    try:
      self._wake(lambda: self._inbox.append(command))
    except errors.EngineDeadError as error:
      command.fail(error)

  def _wake(self, leave: Callable[[], None]) -> None:
    """Calls `leave`, for the thread to see; EngineDeadError if it is gone."""
    with self._wakeup:
      gone = self._is_gone()
      if gone is None:
        leave()
        self._wakeup.notify()
    if gone is not None:
      raise gone()

  def _is_gone(self) -> Callable[[], errors.EngineDeadError] | None:
    if self._stopping and self._gone is None:
      return functools.partial(delivery.gone_error, None)
    return self._gone

  def _close(self, stream: outbox.Stream) -> None:
    with self._wakeup:
      if self._waiting.remove(stream.request.key):
        return
    self._send(
      _Command(
        functools.partial(self._endings.drop, stream), lambda error: None
      )
    )

  # What follows runs on the engine's thread.

  def _run(self) -> None:
    try:
      engine = self._make_engine()
      self._ready.set_result(engine)
      while (commands := self._receive(engine)) is not None:
        for command in commands:
          command.run(engine)
        self._feed(engine)
        self._streams.flush()  # refusals need not wait for a step
        if not self._pause.is_paused and engine.clock() >= engine.step_at:
          self._step_began = time.monotonic()
          for delta in self._step(engine):
            self._endings.route(delta)
          self._step_began = None
        # Whoever reads an output's end and goes on from it is to find that
        # routers know of its pages.
        if self._on_pages is not None:
          self._tell_pages(engine, self._on_pages)
        self._streams.flush()
        if not engine.has_work:
          self._pause.tell_idle()
          self._waiting.has_room = True
    except BaseException as fault:
      # Whatever it was: no reader may wait for ever.
      self._end(fault)
    else:
      self._end(None)

  def _receive(self, engine: engine_lib.Engine) -> list[_Command] | None:
    """Takes the commands that were sent; None if the thread shall end."""

    def has_work() -> bool:
      if engine.has_work and not self._pause.is_paused:
        return True
      return len(self._waiting) > 0 and not self._pause.is_holding

    with self._wakeup:
      while not (self._inbox or self._stopping):
        # What comes while a step computes may still be in the next one.
        now = engine.clock()
        seconds = engine.step_at - now if has_work() else None
        if seconds is not None and seconds <= 0:
          break
        self._wakeup.wait(seconds)
        if seconds is not None:
          engine.metrics.wait_s += engine.clock() - now
      if self._stopping:
        return None
      commands, self._inbox = self._inbox, []
      return commands

  def _feed(self, engine: engine_lib.Engine) -> None:
    if self._pause.is_holding:
      return
    with self._wakeup:
      taken = self._waiting.begin(engine)
      for stream, _ in taken:
        self._streams.add(stream)
      if self._pause.is_draining:
        for stream in self._waiting.take_all():
          self._streams.put(stream, delivery.gone_error(None))
    # Others may submit meanwhile: a long prompt takes its time.
    for stream, refusal in taken:
      try:
        if refusal is not None:
          raise refusal
        engine.add(stream.request)
      except Exception as error:
        self._streams.remove(stream.request.key)
        self._streams.put(stream, error)

  def _tell_pages(self, engine: engine_lib.Engine, tell: _OnPages) -> None:
    assert engine.page_log is not None
    events, load = engine.page_log.take(), engine.load()
    if events or load != self._told:
      self._told = load
      delivery.call_on(self._loop, tell, events, load)

  def _step(self, engine: engine_lib.Engine) -> list[types.OutputDelta]:
    num_steps, busy_s = engine.metrics.num_steps, engine.metrics.busy_s
    try:
      deltas = engine.step()
    except Exception as fault:
      self._num_faults += 1
      if self._num_faults > _MAX_FAULTS:
        raise
      failed = engine.recover(fault)
      logging.error(
        'A step failed; %d requests were in it.', len(failed), exc_info=fault
      )
      self._endings.fail(failed, fault)
      return []
    if deltas:
      self._num_faults = 0
    if engine.metrics.num_steps > num_steps:
      with self._wakeup:
        self._waiting.observe_step(
          engine.metrics.busy_s - busy_s, engine.info.token_budget
        )
    return deltas

  def _end(self, fault: BaseException | None) -> None:
    with self._wakeup:
      if self._has_ended:
        return
      self._has_ended = True
      gone = self._gone or functools.partial(delivery.gone_error, fault)
      self._gone = gone
      commands, self._inbox = self._inbox, []
      waiting_streams = self._waiting.take_all()
    for command in commands:
      command.fail(gone())
    self._pause.fail(gone)
    self._streams.end_all(waiting_streams, gone)
    if not self._ready.done():  # an error of make_engine is its caller's
      self._ready.set_exception(fault or gone())
    elif fault is not None:
      logging.error('The engine stopped.', exc_info=fault)
      delivery.call_on(self._loop, self._on_death, fault)
