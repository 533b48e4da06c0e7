# SPDX-License-Identifier: Apache-2.0
"""How processes that compute one model end: together. No JAX.

One that fails says why, and the first process passes it on to all. One that
is told to end (SIGTERM) has the first one end as if it had been told itself.
Each ends by `os._exit`: JAX would have them wait for each other.
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

from sarathi_jax import errors

CAUSE_S = 1.0  # A step may fail because a process is gone: which, comes soon.

Exit = Callable[[int, str], object]  # with a code and a last line, or ''


def exit_at_once(code: int, message: str = '') -> NoReturn:
  """Ends this process, whatever it waits for.

  Args:
    code: for who started it.
    message: its last line; '' for none.
  """
  sys.stdout.flush()
  if message:
    print(message, file=sys.stderr, flush=True)
  os._exit(code)


class End:
  """What both kinds of ends do.

  Leaving its `with` block ends the process: well, or with an error, of which
  all others are told.

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

  def __exit__(self, kind: type[BaseException] | None,
               error: BaseException | None,
               trace: TracebackType | None) -> None:
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
    """As `with` the end itself, but goes on where it went well."""
    try:
      yield
    except BaseException as error:
      self.__exit__(type(error), error, error.__traceback__)
      raise

  def fail(self, error: Exception) -> None:
    """Ends all processes with an error; any thread."""
    raise NotImplementedError

  def close(self, code: int) -> None:
    """Ends all, as far as this one can."""
    raise NotImplementedError

  def _end(self, fault: errors.SarathiError | None = None) -> bool:
    """Returns whether it is the first end, whose fault counts."""
    with self._lock:
      if self._is_over.is_set():
        return False
      self.fault = fault
      self._is_over.set()
      return True


def gone(process: int, count: int) -> str:
  """What is told of a process that said nothing before it ended."""
  return (f'process {process} of {count} is gone; nothing can be computed '
          'without its devices.')


def told(error: BaseException) -> str:
  """An error in one line."""
  return errors.describe(error).strip().partition('\n')[0]
