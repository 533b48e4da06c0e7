# SPDX-License-Identifier: Apache-2.0
"""All that only a GPU can show; stops before nine minutes are over.

  scripts/gpu_check --output=results

Stages, what matters most first: `limits` (what a copy and a matmul reach on
this device), `engine` (steps and serving on random weights), `attention` (the
kernel's sweep), `tests` (those marked gpu), `torch` (torch's attention on the
same shapes, where there is torch), `mosaic` (the kernel for Hopper on points of
the sweep, where there is one), `no_graphs` and `xla_graphs` (the engine without
CUDA graphs, and with those that XLA makes by itself), `capacity` (the paper's
chats, live, by policy at one SLO), `quantized` (the kernel on caches of int8
and fp8), `write` (what puts keys and values into pages), `tune` (the kernel
with other tiles). Each runs in a process of its own.

What is measured is kept at once, a file a stage: a run that was cut short goes
on where it stopped, and programs that were compiled are not compiled again.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

from absl import app
from absl import flags
import jax
import rich.console
import rich.progress
import rich.table

from sarathi_jax import config as config_lib
from sarathi_jax import xla_flags
from sarathi_jax.benchmarks import common
from sarathi_jax.benchmarks.gpu import journal as journal_lib
from sarathi_jax.benchmarks.gpu import stages
from sarathi_jax.benchmarks.gpu import targets

FLAGS = flags.FLAGS
_ROOT = pathlib.Path(__file__).parents[3]


def define_flags() -> None:
  flags.DEFINE_string('output', 'gpu_check', 'Folder for the results.')
  flags.DEFINE_string('cache_dir', str(config_lib.default_cache_dir()),
                      'Where compiled steps are kept.')
  flags.DEFINE_list('stages', list(stages.STAGES), 'To run, in this order.')
  flags.DEFINE_bool('again', False, 'Run stages that were done, too.')
  flags.DEFINE_float('budget_s', 530, 'No stage is begun after, or goes on.')
  flags.DEFINE_enum('size', 'full', list(stages.SIZES),
                    "'tiny' tries the script.")
  flags.DEFINE_string(
    'torch_python', None, 'A Python that has torch; None: this one.')
  flags.DEFINE_string('run_stage', None, 'Of the script itself.')


def _journal(name: str) -> journal_lib.Journal:
  return journal_lib.Journal(pathlib.Path(FLAGS.output) / f'{name}.jsonl')


def _run_stage(name: str, seconds: float) -> None:
  """A stage in a process of its own.

  Raises:
    RuntimeError: it failed, or took too long; says what it printed.
  """
  given = [f'--{flag}={FLAGS[flag].value}'
           for flag in ('size', 'torch_python')
           if FLAGS[flag].value]
  given.append(f'--output={pathlib.Path(FLAGS.output).resolve()}')
  with tempfile.TemporaryFile('w+') as log:
    given_flags = os.environ.get('XLA_FLAGS', '')
    process = subprocess.Popen(
      [sys.executable, '-m', 'sarathi_jax.benchmarks.gpu.check',
       f'--run_stage={name}', *given], cwd=_ROOT, stdout=log, stderr=log,
      start_new_session=True, env=os.environ | {
        'XLA_FLAGS': f'{given_flags} {stages.XLA_FLAGS.get(name, "")}'.strip(),
        # A stage that is cut short while it compiles gets on the next time.
        'JAX_COMPILATION_CACHE_DIR': os.path.join(
          os.path.expanduser(FLAGS.cache_dir), 'gpu_check'),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'})
    try:
      ended = f'exit status {process.wait(seconds)}'
    except subprocess.TimeoutExpired:
      ended = f'stopped after {seconds:.0f} s, run again to go on'
    finally:  # With all that it started, which holds the GPU's memory.
      with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    if ended != 'exit status 0':
      log.seek(0)
      raise RuntimeError(f'{name}: {ended}: {log.read()[-3000:]}')


def _show(console: rich.console.Console, title: str,
          rows: targets.Rows) -> None:
  if title == 'tests':
    console.print(f'tests: {sum("error" not in r for r in rows)} passed')
    rows = [row for row in rows if 'error' in row]
  # Rows of a kind have their columns in common: one table for each kind.
  kinds: dict[tuple[str, ...], targets.Rows] = {}
  for row in rows:
    short = {k: v for k, v in row.items() if not isinstance(v, list)}
    kinds.setdefault(tuple(short), []).append(short)
  for columns, same in kinds.items():
    table = rich.table.Table(*columns, title=title)
    for row in same:
      table.add_row(*(f'{v:,.4g}' if isinstance(v, float) else str(v)
                      for v in row.values()))
    console.print(table)


def _device(path: pathlib.Path) -> dict[str, str]:
  """What is measured; a folder is for one device and one JAX."""
  # Asked in a process of its own: this one must leave the memory alone.
  platform, kind = subprocess.run(
    [sys.executable, '-c',
     'import jax; d = jax.devices()[0]; print(d.platform, d.device_kind)'],
    stdout=subprocess.PIPE, text=True, check=True).stdout.split(maxsplit=1)
  if platform != 'gpu' and FLAGS.size == 'full':
    raise app.UsageError(
      f'JAX sees no GPU here, but {kind.strip()}; --size=tiny tries the '
      'script on any machine.')
  here = {'device': kind.strip(), 'jax': jax.__version__, 'size': FLAGS.size}
  if path.exists():
    found = json.loads(path.read_text())
    there = {name: found.get(name) for name in here}
    if there != here:
      raise app.UsageError(
        f'--output={FLAGS.output}: holds results of {there}, and this is '
        f'{here}; name another folder.')
  return here


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unexpected argument: {argv[1]}')
  if not FLAGS.stages:
    raise app.UsageError('--stages=: must name one.')
  if unknown := set(FLAGS.stages) - set(stages.STAGES):
    raise app.UsageError(
      f'--stages={",".join(sorted(unknown))}: must be of '
      f'{", ".join(stages.STAGES)}.')
  if name := FLAGS.run_stage:
    xla_flags.set_environment(os.environ)
    journal = _journal(name)
    stages.STAGES[name](stages.SIZES[FLAGS.size], journal)
    journal.complete()
    return
  # Wide, where no terminal says how wide: the tables go to a log.
  console = rich.console.Console(
    highlight=False, width=None if sys.stdout.isatty() else 140)
  path = pathlib.Path(FLAGS.output) / 'gpu_check.json'
  start, failed = time.monotonic(), False
  here = _device(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  for name in FLAGS.stages:
    left = FLAGS.budget_s - (time.monotonic() - start)
    journal = _journal(name)
    if journal.is_complete and not journal.has_errors and not FLAGS.again:
      console.print(f'{name}: done before, in {FLAGS.output}')
    elif left < 10:
      console.print(f'{name}: no time left; run again to go on.')
      failed = True
    else:
      if FLAGS.again:
        journal.forget()
      most = min(left, stages.MOST_S.get(name, left))
      try:
        with console.status(f'{name} (at most {most:.0f} s)'):
          _run_stage(name, most)
      except RuntimeError as error:
        console.print(str(error), markup=False)
    results = {stage: list(_journal(stage).rows.values())
               for stage in stages.STAGES}
    verdicts = targets.judge(results)
    compared = {name: compare(results)
                for name, compare in targets.COMPARISONS.items()}
    common.write_json(
      str(path), 'gpu.check', FLAGS, {k: v for k, v in results.items() if v},
      targets=verdicts, **compared, **here)
    _show(console, name, results[name])
    journal = _journal(name)
    failed |= journal.has_errors or not journal.is_complete
  for name, found in compared.items():
    _show(console, name.replace('_', ' '), found if isinstance(found, list) else
          [{'point': k, 'ratio': v} for k, v in found.items()])
  _show(console, f'targets, {here["device"]}, JAX {here["jax"]}', verdicts)
  console.print(f'{path}, after {time.monotonic() - start:.0f} s.')
  if failed:
    sys.exit(1)


if __name__ == '__main__':
  define_flags()
  app.run(main)
