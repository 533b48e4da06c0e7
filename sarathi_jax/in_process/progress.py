# SPDX-License-Identifier: Apache-2.0
"""Shows the progress of what takes minutes: a bar, or a line now and then."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import time

import rich.console
import rich.markup
import rich.progress

FIRST_LINE_S = 5.0  # What is done sooner needs no line.
LINE_S = 60.0

OnDone = Callable[[int, int], object]  # (how many are done, of how many)


class Lines:
  """Prints lines of progress where there is no terminal to draw a bar in.

  Args:
    console: where to print; if it is a terminal, nothing is printed.
    clock: returns seconds, monotonic.
  """

  def __init__(
    self,
    console: rich.console.Console,
    clock: Callable[[], float] = time.monotonic,
  ) -> None:
    self._console = console
    self._clock = clock
    self._next = clock() + FIRST_LINE_S

  def tell(self, line: Callable[[], str]) -> None:
    """Prints the line, if it is time for one; may be called at any rate."""
    if self._console.is_terminal or (now := self._clock()) < self._next:
      return
    self._next = now + LINE_S
    self._console.print(line(), markup=False, highlight=False, soft_wrap=True)


def bar(console: rich.console.Console) -> rich.progress.Progress:
  """Returns a bar for tasks with a field `count`; hidden without a terminal."""
  return rich.progress.Progress(
    rich.progress.TextColumn('{task.description}'),
    rich.progress.BarColumn(),
    rich.progress.TextColumn('{task.fields[count]}'),
    rich.progress.TimeElapsedColumn(),
    console=console,
    transient=True,
    disable=not console.is_terminal,
  )


def told(
  on_done: OnDone | None,
  description: str,
) -> contextlib.AbstractContextManager[OnDone]:
  """Tells a caller how much is done, or shows it to people if there is none.

  Args:
    on_done: the caller's; None to show a count.
    description: of what is counted.

  Returns:
    A block that gives the function to call.
  """
  if on_done is None:
    return counted(description)
  return contextlib.nullcontext(on_done)


@contextlib.contextmanager
def counted(description: str) -> Iterator[OnDone]:
  """Shows a count on standard error.

  Args:
    description: of what is counted.

  Yields:
    A function to call with how many are done, and of how many.
  """
  console = rich.console.Console(stderr=True)
  lines = Lines(console)
  with bar(console) as progress:
    task = progress.add_task(description, total=None, count='')

    def on_done(done: int, total: int) -> None:
      progress.update(
        task, completed=done, total=total, count=f'{done}/{total}'
      )
      lines.tell(lambda: f'{description}: {done} of {total}')

    yield on_done
