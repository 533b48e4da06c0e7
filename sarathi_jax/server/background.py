# SPDX-License-Identifier: Apache-2.0
"""What runs beside the calls, and what becomes of it if it ends by itself.

  engine     the engine's thread                    the server ends; while it
                                                    hangs, liveness says so
  grpc       grpc.aio's task that takes calls       the server ends
  watch      who looks after all of these           the server ends
  gateway    smg, a child, and who listens to it    is started again
  http       uvicorn's task                         is started again
  metrics    the thread that takes scrapers         is started again
  trace      the thread that writes --trace_dir     is started again
  spans      OpenTelemetry's thread                 is started again

So no part of a server is ever missing unnoticed. Imports no gRPC and no JAX.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
import dataclasses
import threading
import time
from typing import NamedTuple, NoReturn

from absl import logging

from sarathi_jax import errors

_LOOK_S = 0.5
_PAUSE_S = 1.0  # before the first start anew; twice as long before the next
_MAX_PAUSE_S = 30.0
_STEADY_S = 60.0  # what ran so long begins with the first pause again


class Background(NamedTuple):
  """One thing that runs in the background.

  Attributes:
    name: what logs and metrics call it.
    why_ended: tells what ended it; None while it runs. Any thread.
    restart: starts it again; None: nothing is left without it.
    is_up: whether it does what it is for; None: if it runs. Any thread.
    on_change: told what `is_up` says, when that changes; on the event loop.
  """

  name: str
  why_ended: Callable[[], str | None]
  restart: Callable[[], object] | None = None
  is_up: Callable[[], bool] | None = None
  on_change: Callable[[bool], object] | None = None


class Thread:
  """A thread that runs until it is told to end.

  Args:
    name: what logs and metrics call it.
    run: what it does.

  Attributes:
    is_ending: whether it was told to end.
  """

  def __init__(self, name: str, run: Callable[[], object]) -> None:
    self._name = name
    self._run = run
    self.is_ending = False
    self.restart()

  @property
  def as_background(self) -> Background:
    """The thread as `Watch` takes it."""
    return Background(self._name, self.why_ended, self.restart)

  def why_ended(self) -> str | None:
    """Tells whether it is gone; None while it runs."""
    is_well = self.is_ending or self._thread.is_alive()
    return None if is_well else 'its thread is gone'

  def restart(self) -> None:
    """Runs from a new thread."""
    self._thread = threading.Thread(
      target=self._run, name=self._name, daemon=True
    )
    self._thread.start()

  def join(self, timeout_s: float | None = None) -> None:
    """Waits for its end."""
    self._thread.join(timeout_s)


@dataclasses.dataclass(slots=True)
class _Record:
  pause_s: float
  started: float
  due: float | None = None  # when it is started again
  is_up: bool = True


class Watch:
  """Looks after all that runs in the background; on the event loop.

  Args:
    fail: ends the server.

  Attributes:
    num_restarts: how often each was started again, by name.
  """

  def __init__(self, fail: Callable[[errors.EngineDeadError], object]) -> None:
    self._fail = fail
    self._watched: dict[str, tuple[Background, _Record]] = {}
    self._task: asyncio.Task[NoReturn] | None = None
    self.num_restarts: Counter[str] = Counter()

  def add(self, background: Background) -> None:
    """Looks after another one, which runs already."""
    self.num_restarts[background.name] = 0
    self._watched[background.name] = (
      background,
      _Record(_PAUSE_S, time.monotonic()),
    )

  def is_up(self) -> dict[str, bool]:
    """Returns whether each does what it is for, by name; any thread."""
    return {
      name: _is_up(background)
      for name, (background, _) in list(self._watched.items())
    }

  def start(self) -> None:
    """Begins to look, until `stop`."""
    self._task = asyncio.create_task(self._run(), name='watch')
    self._task.add_done_callback(self._on_done)

  async def stop(self) -> None:
    """Lets them end."""
    task, self._task = self._task, None
    if task is not None:
      task.cancel()
      await asyncio.wait((task,))

  def _on_done(self, task: asyncio.Task[NoReturn]) -> None:
    error = None if task.cancelled() else task.exception()
    if task is self._task:
      self._fail(
        errors.EngineDeadError(
          f"what looks after the server's background ended: {error!r}"
        )
      )

  async def _run(self) -> NoReturn:
    while True:
      for background, record in list(self._watched.values()):
        self._look(background, record, time.monotonic())
      await asyncio.sleep(_LOOK_S)

  def _look(self, background: Background, record: _Record, now: float) -> None:
    is_up = _is_up(background)
    if background.on_change is not None and is_up != record.is_up:
      background.on_change(is_up)
    record.is_up = is_up
    why = background.why_ended()
    if why is None:
      return
    if background.restart is None:
      del self._watched[background.name]
      self._fail(errors.EngineDeadError(f'{background.name} ended: {why}'))
    elif record.due is None:
      if now - record.started > _STEADY_S:
        record.pause_s = _PAUSE_S
      record.due = now + record.pause_s
      logging.error(
        '%s ended: %s. It is started again in %g s.',
        background.name,
        why,
        record.pause_s,
      )
    elif now >= record.due:
      record.due, record.started = None, now
      record.pause_s = min(2 * record.pause_s, _MAX_PAUSE_S)
      self.num_restarts[background.name] += 1
      try:
        background.restart()
      except Exception as error:  # the next look finds that it doesn't run
        logging.error("%s can't be started.", background.name, exc_info=error)


def _is_up(background: Background) -> bool:
  return (
    background.why_ended() is None
    if background.is_up is None
    else background.is_up()
  )
