# SPDX-License-Identifier: Apache-2.0
"""Ends the processes that compute one model together. No JAX.

A process that fails says why, and the first process passes it on to all. A
process that is told to end (SIGTERM) asks the first one to end, as if that had
been told itself. Each ends by `os._exit`, as JAX would wait for the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import os
import signal
import sys
import threading
import traceback
from types import TracebackType
from typing import NoReturn, Self

import rich.console

from sarathi_jax import errors

# A step may fail because a process is gone; the news of it comes within this.
CAUSE_S = 1.0

Exit = Callable[[int, str], object]  # with a code and a last line, or ''


def exit_at_once(code: int, message: str = '') -> NoReturn:
  """Ends this process, whatever it waits for.

  Args:
    code: the exit code.
    message: the last line on standard error; '' for none.
  """
  sys.stdout.flush()
  # A bar, which is on standard error, hides it.
  rich.console.Console(stderr=True).show_cursor()
  if message:
    print(message, file=sys.stderr, flush=True)
  os._exit(code)


class End:
  """One process's end of the connections; the base of both kinds.

  Leaving its `with` block ends the process, and tells all others of an error.

  Args:
    exit_with: ends this process.

  Attributes:
    fault: why nothing can go on, once that is so.
  """

  def __init__(self, exit_with: Exit) -> None:
    self.fault: errors.SarathiError | None = None
    self._exit = exit_with
    self._lock = threading.Lock()
    self._is_over = threading.Event()

  def __enter__(self) -> Self:
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    if isinstance(error, Exception):
      if not isinstance(error, errors.SarathiError):
        traceback.print_exception(error)
      self._is_over.wait(CAUSE_S)
      self.fail(error)
      self._exit(1, f'error: {self.fault}')
    elif isinstance(error, KeyboardInterrupt):
      self.close(128 + signal.SIGINT)  # The caller has a word to say.
    else:
      code = error.code if isinstance(error, SystemExit) else 0
      code = code if isinstance(code, int) else int(code is not None)
      self.close(code)
      self._exit(code, '')

  @contextlib.contextmanager
  def starting(self) -> Iterator[None]:
    """Ends the process if the block raises, as the `with` of the end itself.

    Goes on if the block succeeds.
    """
    try:
      yield
    except BaseException as error:
      self.__exit__(type(error), error, error.__traceback__)
      raise

  def fail(self, error: Exception) -> None:
    """Ends all processes with an error; any thread may call it."""
    raise NotImplementedError

  def close(self, code: int) -> None:
    """Ends all processes, as far as this one can, with an exit code."""
    raise NotImplementedError

  def _end(self, fault: errors.SarathiError | None = None) -> bool:
    """Notes the fault; returns whether this is the first end, which counts."""
    with self._lock:
      if self._is_over.is_set():
        return False
      self.fault = fault
      self._is_over.set()
      return True


def gone(process: int, count: int) -> str:
  """Returns the message about a process that ended without a word."""
  return (
    f'process {process} of {count} is gone; nothing can be computed '
    'without its devices.'
  )


def told(error: BaseException) -> str:
  """Returns an error in one line."""
  return errors.describe(error).strip().partition('\n')[0]
