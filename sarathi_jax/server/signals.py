# SPDX-License-Identifier: Apache-2.0
"""What ends a server from outside: signals, and what counts as one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
import functools
import signal
from typing import Any

# In place of a signal: the server can't go on, or another process left.
FAILED, _LEFT = -1, -2


class Signals(asyncio.Queue[int]):
  """The signals that came, for a running event loop.

  Where all of several processes are told to end, the first one gets a signal
  and hears of the others': they count as one.
  """

  def __init__(self) -> None:
    super().__init__()
    self._events = asyncio.get_running_loop()
    self._is_told = self._is_left = False
    for number in (signal.SIGINT, signal.SIGTERM):
      self._events.add_signal_handler(number, self.put_nowait, number)

  def tellers(self) -> tuple[Callable[[], object], Callable[[], object]]:
    """Returns what to call, on any thread: if the server can't go on, and if
    another process left."""
    failed, left = (
      functools.partial(
        self._events.call_soon_threadsafe, self.put_nowait, number
      )
      for number in (FAILED, _LEFT)
    )
    return failed, left

  def put_nowait(self, number: int) -> None:
    if number == _LEFT:
      if self._is_told or self._is_left:
        return
      self._is_left, number = True, signal.SIGTERM
    elif number != FAILED:
      was_told, self._is_told = self._is_told, True
      if self._is_left and not was_told:
        return
    super().put_nowait(number)

  async def until(self, work: Coroutine[Any, Any, None]) -> int:
    """Runs `work` until its end or a signal; returns the signal, if any."""
    tasks = (asyncio.create_task(work), asyncio.create_task(self.get()))
    done, undone = await asyncio.wait(
      tasks, return_when=asyncio.FIRST_COMPLETED
    )
    for task in undone:
      task.cancel()
    if tasks[0] in done:
      await tasks[0]
      return 0
    return tasks[1].result()


def exit_code(number: int) -> int:
  """Returns the exit code of the process that a signal ended."""
  return 1 if number == FAILED else 128 + number
