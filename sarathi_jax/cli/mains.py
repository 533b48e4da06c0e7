# SPDX-License-Identifier: Apache-2.0
"""Starts mains, and reports their errors. No JAX."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import contextlib
import signal
import sys
from typing import Any
import warnings

from absl import app
from absl import flags
from absl import logging

from sarathi_jax import errors

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run(
  main: Callable[..., Any],
  define_flags: Callable[[], object] = lambda: None,
  *,
  takes_arguments: bool = False,
  starts_processes: bool = False,
  verbosity: int | None = None,
) -> None:
  """Runs a main, whose `--help` shows its module's docstring and flags.

  absl shows those of the module that Python was started with, which is
  another one for a console script, or for the main of a package.

  Args:
    main: see `call`.
    define_flags: defines flags that are not yet defined.
    takes_arguments: see `call`.
    starts_processes: whether it starts others, and ends them when it ends. A
      signal that ends it then raises SystemExit, which it cleans up after.
    verbosity: the level of absl's log, where --verbosity does not say; None:
      absl's own. JAX, which looks for TPUs, and Orbax log a lot.
  """
  define_flags()
  module = sys.modules[main.__module__]
  sys.modules['__main__'].__doc__ = module.__doc__
  for flag in flags.FLAGS.get_key_flags_for_module(module):
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)

  def called(argv: Sequence[str]) -> Any:
    if verbosity is not None and not flags.FLAGS['verbosity'].present:
      logging.set_verbosity(verbosity)
    with warnings.catch_warnings():
      warnings.showwarning = _show_warning
      if starts_processes:
        _exit_at_signals()
      return call(main, argv, takes_arguments=takes_arguments)

  app.run(called)


def _exit_at_signals() -> None:
  """Lets what ends a process by itself raise SystemExit in it.

  It does nothing about a signal that is ignored, as SIGHUP is under nohup.
  """

  def leave(number: int, _: Any) -> None:
    sys.exit(128 + number)

  for number in _ENDING:
    if signal.getsignal(number) != signal.SIG_IGN:
      signal.signal(number, leave)


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
  """Holds what would end this process back until the block's end.

  A block starts a process and says who will end it: what a signal raises in
  between would leave a process that nobody knows of.
  """
  held: list[int] = []
  handlers = {
    number: handler
    for number in _ENDING
    if callable(handler := signal.getsignal(number))
  }
  for number in handlers:
    signal.signal(number, lambda number, _: held.append(number))
  try:
    yield
  finally:
    for number, handler in handlers.items():
      signal.signal(number, handler)
    for late in held:
      signal.raise_signal(late)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
  """Tells the message alone: where in the code it arose helps no user."""
  print(f'warning: {message}', file=sys.stderr)


def call(
  main: Callable[..., Any],
  argv: Sequence[str],
  *,
  takes_arguments: bool = False,
) -> Any:
  """Calls a main; reports a user's error, or one of ours, in one line.

  Args:
    main: returns the exit code. Errors that have a name in `errors` are
      reported, others are its faults.
    argv: its name, and the arguments that are no flags.
    takes_arguments: whether it is given these; else there must be none.

  Returns:
    The exit code; None is 0.
  """
  try:
    if takes_arguments:
      return main(argv[1:])
    if len(argv) > 1:
      raise app.UsageError(f'unexpected argument: {argv[1]}')
    return main()
  except app.UsageError as error:
    print(f'error: {error}; see --help', file=sys.stderr)
  except errors.SarathiError as error:
    print(f'error: {error}', file=sys.stderr)
  return 1
