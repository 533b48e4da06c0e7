# SPDX-License-Identifier: Apache-2.0
"""Lets several callers run requests on one engine, one thread at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
import contextlib
import sys
from typing import Protocol

from sarathi_jax import errors
from sarathi_jax import types
from sarathi_jax.engine import engine as engine_lib
from sarathi_jax.in_process import interrupts
from sarathi_jax.in_process import turns as turns_lib


class Reader(Protocol):
  """Who is told of what some requests gain.

  Attributes:
    inbox: what was not read yet.
  """

  inbox: deque[types.OutputDelta]


class Run(Iterator[types.OutputDelta]):
  """The outputs of one call's requests, as they come.

  Leaving it early, by `close` or by dropping it, aborts what is left. If
  another thread uses the engine, reading raises BusyError and loses nothing:
  read on later.
  """

  def __init__(
    self, runs: Runs, requests: Sequence[types.Request], what: str
  ) -> None:
    self._runs = runs
    self._what = what
    self._new = list(requests)
    self._left: set[str] = set()
    self.inbox: deque[types.OutputDelta] = deque()

  def __iter__(self) -> Run:
    return self

  def __next__(self) -> types.OutputDelta:
    try:
      while not self.inbox:
        if not self._new and not self._left:
          raise StopIteration
        with self._runs.turns.take(self._what):
          while self._new:
            self._runs.begin(self._new[0], self)
            self._left.add(self._new.pop(0).request_id)
          self._runs.step()
    except (errors.BusyError, StopIteration):
      raise
    except BaseException:
      self.close()
      raise
    delta = self.inbox.popleft()
    if delta.ends_request:
      self._left.discard(delta.request_id)
    return delta

  def close(self) -> None:
    """Aborts what is left."""
    left, self._left = self._left, set()
    self._new.clear()
    self.inbox.clear()
    if left:
      self._runs.abandon(left)

  def __del__(
    self, is_finalizing: Callable[[], bool] = sys.is_finalizing
  ) -> None:
    # As Python ends, modules are gone, this one's as well.
    if self._left and not is_finalizing():
      self.close()


class Runs:
  """An engine that is stepped by whoever waits for its outputs.

  Runs may take turns: what a step brings for another run waits in its inbox.

  Args:
    engine: an idle one, which nobody else uses.
    check: raises if nothing can be computed at the moment.

  Attributes:
    turns: lets in one thread at a time.
    fault: the error that stopped the engine, if any.
  """

  def __init__(
    self, engine: engine_lib.Engine, check: Callable[[], None]
  ) -> None:
    self.turns = turns_lib.Turns('LLM')
    self.fault: Exception | None = None
    self._engine = engine
    self._check = check
    self._runs: dict[str, Reader] = {}  # by request
    self._abandoned: deque[str] = deque()
    self._is_inside = False

  def begin(self, request: types.Request, run: Reader) -> None:
    """Adds a request of a run, or of another reader."""
    with self.inside():
      self._engine.add(request)
      self._runs[request.request_id] = run

  def step(self) -> None:
    """Steps the engine, and hands out the outputs to their runs."""
    if self.fault is None:
      self._check()
    with self.whole():
      for delta in self._engine.step():
        if run := self._runs.get(delta.request_id):
          run.inbox.append(delta)
          if delta.ends_request:
            del self._runs[delta.request_id]

  def abandon(self, request_ids: set[str]) -> None:
    """Aborts requests: at once, or, if the engine is in use, before a step.

    Any thread may call it, and so may the garbage collector, in the middle of
    a step.
    """
    for request_id in request_ids:
      self._runs.pop(request_id, None)
    self._abandoned.extend(request_ids)
    if not self._is_inside:
      with contextlib.suppress(errors.BusyError), self.turns.take('close'):
        self._abort_abandoned()

  @contextlib.contextmanager
  def inside(self) -> Iterator[None]:
    """Keeps Ctrl-C and the garbage collector out of the block."""
    with interrupts.deferred():
      self._is_inside = True
      try:
        self._abort_abandoned()
        yield
      finally:
        self._is_inside = False

  @contextlib.contextmanager
  def whole(self) -> Iterator[None]:
    """Gives the engine up if the block raises.

    Raises:
      EngineDeadError: it raised, or the engine was given up before.
    """
    if self.fault is None:
      try:
        with self.inside():
          yield
        return
      except Exception as error:  # A device's faults have no common type.
        self.fault = error
    raise errors.EngineDeadError(
      f'the engine stopped: {errors.describe(self.fault)}; make a new LLM.'
    ) from self.fault

  def _abort_abandoned(self) -> None:
    while self._abandoned:
      self._engine.abort(self._abandoned.popleft())
