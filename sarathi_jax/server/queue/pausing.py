# SPDX-License-Identifier: Apache-2.0
"""Whether requests begin and steps are made. Imports no gRPC and no JAX."""

from __future__ import annotations

from collections.abc import Callable
import concurrent.futures
import enum


class PauseMode(enum.Enum):
  """What a pause does to requests that are running."""

  KEEP = 'keep'
  WAIT = 'wait'
  ABORT = 'abort'


class Pause:
  """A pause, or none. Only the engine's thread sets it; any may read it.

  Attributes:
    is_holding: whether no requests begin.
    is_paused: whether no steps are made either.
    is_draining: whether requests that don't begin at once never will.
  """

  def __init__(self) -> None:
    self.is_holding = False
    self.is_paused = False
    self.is_draining = False
    self._when_idle: list[concurrent.futures.Future[None]] = []

  def begin(
    self, mode: PauseMode, idle: concurrent.futures.Future[None]
  ) -> None:
    """Begins a pause; `idle` is done once nothing runs, or is kept from it."""
    self.is_holding = True
    self.is_paused = mode is PauseMode.KEEP
    self._when_idle.append(idle)
    if self.is_paused:
      self.tell_idle()

  def end(self, *, is_draining: bool = False) -> None:
    """Ends the pause, for good or to drain."""
    self.is_holding = self.is_paused = False
    self.is_draining = is_draining

  def tell_idle(self) -> None:
    """Tells those who wait for the pause that nothing runs any more."""
    while self._when_idle:
      idle = self._when_idle.pop()
      if idle.set_running_or_notify_cancel():  # else its caller has left
        idle.set_result(None)

  def fail(self, make_error: Callable[[], Exception]) -> None:
    """Tells those who wait for the pause that the engine is gone."""
    for idle in self._when_idle:
      if idle.set_running_or_notify_cancel():
        idle.set_exception(make_error())
