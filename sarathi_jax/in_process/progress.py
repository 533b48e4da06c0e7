# SPDX-License-Identifier: Apache-2.0
"""How far something is that takes minutes: a bar, or now and then a line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import time

import rich.console
import rich.markup
import rich.progress

FIRST_LINE_S = 5.0  # What is over before needs no line.
LINE_S = 60.0

OnDone = Callable[[int, int], object]  # How many are done, and of how many.


class Lines:
  """Says how far something is where there is no terminal to draw a bar in.

  Args:
    console: where; if it is a terminal, nothing is said.
    clock: seconds, monotonic.
  """

  def __init__(self, console: rich.console.Console,
               clock: Callable[[], float] = time.monotonic) -> None:
    self._console = console
    self._clock = clock
    self._next = clock() + FIRST_LINE_S

  def tell(self, line: Callable[[], str]) -> None:
    """Prints the line, if it is time; may be called as often as one likes."""
    if self._console.is_terminal or (now := self._clock()) < self._next:
      return
    self._next = now + LINE_S
    self._console.print(line(), markup=False, highlight=False, soft_wrap=True)


def bar(console: rich.console.Console) -> rich.progress.Progress:
  """A bar of tasks that have a field `count`, where there is a terminal."""
  return rich.progress.Progress(
    rich.progress.TextColumn('{task.description}'),
    rich.progress.BarColumn(),
    rich.progress.TextColumn('{task.fields[count]}'),
    rich.progress.TimeElapsedColumn(), console=console, transient=True,
    disable=not console.is_terminal)


def told(on_done: OnDone | None, description: str,
         ) -> contextlib.AbstractContextManager[OnDone]:
  """Tells a caller how much is done, or else a person."""
  if on_done is None:
    return counted(description)
  return contextlib.nullcontext(on_done)


@contextlib.contextmanager
def counted(description: str) -> Iterator[OnDone]:
  """Shows a count on standard error.

  Args:
    description: of what is counted.

  Yields:
    What is to be told how many are done, and of how many.
  """
  console = rich.console.Console(stderr=True)
  lines = Lines(console)
  with bar(console) as progress:
    task = progress.add_task(description, total=None, count='')

    def on_done(done: int, total: int) -> None:
      progress.update(
        task, completed=done, total=total, count=f'{done}/{total}')
      lines.tell(lambda: f'{description}: {done} of {total}')

    yield on_done
