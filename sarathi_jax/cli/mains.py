# SPDX-License-Identifier: Apache-2.0
"""How mains start. No JAX."""

from __future__ import annotations

from collections.abc import Callable
import sys
from typing import Any

from absl import app
from absl import flags


def run(main: Callable[[list[str]], Any]) -> None:
  """Runs a main, whose `--help` shows its module's docstring and flags.

  absl shows those of the module that Python was started with, which is
  another one for a console script, or for the main of a package. A usage
  error is one line, and not all of the help.

  Args:
    main: takes the arguments that are no flags; what it returns is the exit
      code. All flags are defined.
  """
  module = sys.modules[main.__module__]
  sys.modules['__main__'].__doc__ = module.__doc__
  for flag in flags.FLAGS.get_key_flags_for_module(module):
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)

  def one_line(argv: list[str]) -> Any:
    try:
      return main(argv)
    except app.UsageError as error:
      print(f'error: {error}; see --help', file=sys.stderr)
      return 1

  app.run(one_line)
