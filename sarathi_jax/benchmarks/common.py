# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: facts that every result needs to be understood."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import datetime
import importlib.metadata
import json
import multiprocessing
import os
import pathlib
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

import rich.console
import rich.progress
import rich.table

from sarathi_jax import config as config_lib
from sarathi_jax import errors

_END_S = 20.0  # for another process to end by itself
_PACKAGES = ('jax', 'jaxlib', 'numpy', 'sarathi-jax', 'tokenizers')


def _version(package: str) -> str | None:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


def _cpu() -> str:
  info = pathlib.Path('/proc/cpuinfo')
  if info.exists():
    for line in info.read_text().splitlines():
      if line.startswith('model name'):
        return line.split(':', 1)[1].strip()
  return platform.processor()


def sleep_until(time_s: float) -> None:
  """Waits on the clock of engines."""
  time.sleep(max(0.0, time_s - time.monotonic()))


def machine() -> dict[str, Any]:
  """Describes the host; a benchmark that uses a device adds its name."""
  return {
    'cpu': _cpu(),
    'cores': os.cpu_count(),
    'load': os.getloadavg()[0],
    'python': platform.python_version(),
    'versions': {p: v for p in _PACKAGES if (v := _version(p))},
  }


def without_folder(value: Any) -> Any:
  """Cuts a path to its last name, as the rest says nothing elsewhere.

  Or each path of several.
  """
  if isinstance(value, list):
    return [without_folder(one) for one in value]
  is_path = isinstance(value, str) and os.path.isabs(value)
  return os.path.basename(value) if is_path else value


class PeerError(errors.SarathiError):
  """A program that a benchmark started failed; has the end of its output."""


def check_program(flag: str, path: str) -> None:
  """Raises ConfigError if a flag's value is no program."""
  config_lib.check(
    shutil.which(path) is not None, flag, path, 'must be a program'
  )


@contextlib.contextmanager
def process(run: Callable[..., object], *args: Any) -> Iterator[Any]:
  """Runs a function in another process; yields this end of a pipe to it.

  Args:
    run: gets the pipe's other end, and then `args`; ends when it reads None.
    *args: further arguments.
  """
  context = multiprocessing.get_context('spawn')
  here, there = context.Pipe()
  other = context.Process(target=run, args=(there, *args), daemon=True)
  other.start()
  there.close()  # else nobody would hear of its death
  try:
    yield here
    here.send(None)
    other.join(_END_S)
  finally:
    other.kill()


def kill(process: subprocess.Popen[Any]) -> None:
  """Kills a process that has a session of its own, and what it started."""
  with contextlib.suppress(ProcessLookupError):
    os.killpg(process.pid, signal.SIGKILL)
  process.wait()


def table(rows: Sequence[Mapping[str, Any]], title: str) -> rich.table.Table:
  """Makes a table for people, of rows with the same columns."""
  shown = rich.table.Table(*rows[0], title=title)
  for row in rows:
    shown.add_row(
      *(f'{v:,.4g}' if isinstance(v, float) else str(v) for v in row.values())
    )
  return shown


def progress(console: rich.console.Console) -> rich.progress.Progress:
  """Makes bars that show what is done, and the time that it took and will take.

  They are redrawn once a second only, as what is measured shares the processor.
  """
  return rich.progress.Progress(
    rich.progress.TextColumn('{task.description}'),
    rich.progress.BarColumn(),
    rich.progress.TaskProgressColumn(),
    rich.progress.TimeElapsedColumn(),
    rich.progress.TextColumn('left'),
    rich.progress.TimeRemainingColumn(compact=True, elapsed_when_finished=True),
    console=console,
    transient=True,
    refresh_per_second=1,
  )


def command(module: str, arguments: Sequence[str]) -> str:
  """Returns what to type to run the same again, but for where files lie."""
  return shlex.join(
    [
      'python',
      '-m',
      f'sarathi_jax.benchmarks.{module}',
      *(
        f'{name}={without_folder(value)}' if is_given else argument
        for argument in arguments
        for name, is_given, value in [argument.partition('=')]
      ),
    ]
  )


def flag_values(benchmark: str, flags: Any) -> dict[str, Any]:
  """Returns the values of a benchmark's flags, and of the engine's.

  Args:
    benchmark: its module's name.
    flags: absl's FLAGS.
  """
  # absl names the main module by its file, others by their dotted names.
  ours = (
    f'{benchmark.replace(".", "/")}.py',
    f'.{benchmark}',
    'sarathi_jax.cli.flags',
  )
  return {
    flag.name: without_folder(flag.value)
    for module, defined in flags.flags_by_module_dict().items()
    if module.endswith(ours)
    for flag in defined
  }


def write_json(
  path: str | None, benchmark: str, flags: Any, results: Any, **more: Any
) -> None:
  """Writes results with their circumstances; does nothing without a path.

  Args:
    path: the file.
    benchmark: its module's name; its flags, and the engine's, are kept.
    flags: absl's FLAGS.
    results: anything that JSON can hold.
    **more: further facts, such as the device.
  """
  if not path:
    return
  pathlib.Path(path).write_text(
    json.dumps(
      {
        'benchmark': benchmark,
        'date': datetime.date.today().isoformat(),
        'command': command(benchmark, sys.argv[1:]),
        'machine': machine(),
        **more,
        'flags': flag_values(benchmark, flags),
        'results': results,
      },
      indent=1,
    )
    + '\n'
  )
