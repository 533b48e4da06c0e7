# SPDX-License-Identifier: Apache-2.0
"""Runs a stage in processes of its own: it may crash, or never end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import contextlib
import pathlib
import subprocess
import time

from sarathi_jax.benchmarks import common
from sarathi_jax.benchmarks import journal as journal_lib
from sarathi_jax.cli import mains

# A process that fails with this says why in its last line, and all end.
USAGE_ERROR = 2
_LAST = 3000  # characters of a log, to be shown


def run(
  command: Sequence[str],
  environment: Mapping[str, str],
  log: pathlib.Path,
  journal: journal_lib.Journal,
  most_s: float,
  cwd: pathlib.Path,
) -> str | None:
  """Runs a command, again after each point that it crashes at.

  Args:
    command: goes through the points of a journal that are not in it yet.
    environment: its whole environment.
    log: takes what it prints, after what is there.
    journal: of the same file; is told of points that ended their process.
    most_s: the most seconds of all tries together.
    cwd: folder where it runs.

  Returns:
    Why it is not done, with the end of its log; None if it is.

  Raises:
    SystemExit: the command says that it was called wrongly.
  """
  deadline = time.monotonic() + most_s
  while True:
    before = len(journal_lib.Journal(journal.path).rows)
    status = _run_once(
      command, environment, log, cwd, deadline - time.monotonic()
    )
    last = log.read_text(errors='replace')[-_LAST:]
    if status == 0:
      return None
    if status is None:
      return f'stopped after {most_s:.0f} s, run again to go on'
    if status == USAGE_ERROR:
      raise SystemExit(last.strip().splitlines()[-1])
    ended = journal_lib.Journal(journal.path)
    if ended.under_way is not None:
      ended.add_broken(ended.under_way, f'its process ended with {status}')
    elif len(ended.rows) == before:  # It would do no better.
      return f'exit status {status}: {last}'


def _run_once(
  command: Sequence[str],
  environment: Mapping[str, str],
  log: pathlib.Path,
  cwd: pathlib.Path,
  most_s: float,
) -> int | None:
  """Returns the exit status, negative for a signal; None if it was stopped."""
  with contextlib.ExitStack() as stack:
    with log.open('a') as file, mains.signals_held():
      process = subprocess.Popen(
        command,
        cwd=cwd,
        stdout=file,
        stderr=file,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        env=dict(environment),
      )
      # With all that it started, which holds the GPU's memory.
      stack.callback(common.kill, process)
    try:
      return process.wait(max(0.0, most_s))
    except subprocess.TimeoutExpired:
      return None
