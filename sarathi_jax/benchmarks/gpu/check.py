# SPDX-License-Identifier: Apache-2.0
"""Measures all that only a GPU can show, in one call of nine minutes.

  scripts/gpu_check --output=/tmp/gpu_check --archive=/tmp/gpu_check.tar.gz

Stages, the most important first: `preflight` (what would fail all the others),
`tests` (those marked gpu), `engine` (whole steps, and their kernels),
`variants` (a step by other choices of XLA), `attention` (the kernel's most
important points), `tune` (the kernel with other tiles), `mosaic` (the kernel
for Hopper, where there is one); and, for a second call, `serving` (the engine's
loop), `capacity` (the paper's chats, live, by policy at one SLO), `write` (what
puts keys and values into pages, and what adds and normalizes), `filters` (what
finds the threshold of top-k and top-p), `sweep` (the kernel's other points),
`quantized` (the kernel on caches of int8 and fp8), `torch` (torch's attention
on the same shapes). Each runs in a process of its own, under a limit of its
own; README.md beside this file tells more.

What is measured is kept at once, and after each stage all of it is in the
archive. An interrupted run goes on where it stopped, and after points that
crashed; programs that were compiled are not compiled again.
"""

from __future__ import annotations

from collections.abc import Iterator
import json
import os
import pathlib
import sys
import tempfile
import time

from absl import app
from absl import flags
import jax
import rich.console

from sarathi_jax import config as config_lib
from sarathi_jax import xla_flags
from sarathi_jax.benchmarks import common
from sarathi_jax.benchmarks import journal as journal_lib
from sarathi_jax.benchmarks.gpu import archive
from sarathi_jax.benchmarks.gpu import preflight
from sarathi_jax.benchmarks.gpu import processes
from sarathi_jax.benchmarks.gpu import sizes
from sarathi_jax.benchmarks.gpu import stages
from sarathi_jax.benchmarks.gpu import tables
from sarathi_jax.benchmarks.gpu import targets
from sarathi_jax.cli import mains

FLAGS = flags.FLAGS
_ROOT = pathlib.Path(__file__).parents[3]
_LEAST_S = 10.0  # with less time left, no stage is begun


def define_flags() -> None:
  flags.DEFINE_string(
    'output',
    os.path.join(tempfile.gettempdir(), 'gpu_check'),
    'Folder to write results to; outside the source tree, which some copy.',
  )
  flags.DEFINE_string(
    'archive', None, 'File to pack all results into. Default: OUTPUT.tar.gz.'
  )
  flags.DEFINE_string(
    'cache_dir',
    str(config_lib.default_cache_dir()),
    'Folder to keep compiled steps in.',
  )
  flags.DEFINE_list(
    'stages', list(stages.STAGES), 'Stages to run, in this order.'
  )
  flags.DEFINE_bool(
    'again', False, 'Run stages anew, even those that were done.'
  )
  flags.DEFINE_float(
    'budget_s', 540, 'Seconds after which no stage begins or goes on.'
  )
  flags.DEFINE_enum(
    'size',
    'full',
    list(sizes.SIZES),
    "How much to measure; 'tiny' tries the script, on any machine.",
  )
  flags.DEFINE_string(
    'torch_python',
    None,
    'Python interpreter that has torch. Default: this one.',
  )
  flags.DEFINE_enum(
    'hang',
    None,
    list(stages.STAGES),
    'Stage that sleeps in place of measuring, to try the time limits.',
  )
  flags.DEFINE_string(
    'run_stage',
    None,
    'Stage to run in this process; the script itself sets this.',
  )


def _output() -> pathlib.Path:
  return pathlib.Path(FLAGS.output).resolve()


def _cache() -> pathlib.Path:
  return pathlib.Path(FLAGS.cache_dir).expanduser().resolve() / 'gpu_check'


def _journal(name: str) -> journal_lib.Journal:
  return journal_lib.Journal(_output() / f'{name}.jsonl')


def _run_here(name: str) -> None:
  """Runs a stage in this process, which is for it alone."""
  if name == FLAGS.hang:
    time.sleep(1e6)
  xla_flags.set_environment(os.environ)
  if error := _wrong_device():
    print(error)
    sys.exit(processes.USAGE_ERROR)
  journal = _journal(name)
  stages.STAGES[name].run(
    stages.Run(sizes.SIZES[FLAGS.size], journal, _journal('preflight'))
  )
  journal.complete()


def _wrong_device() -> str | None:
  """Notes the device and JAX; returns why the folder is not for them, if so."""
  device = jax.devices()[0]
  if device.platform != 'gpu' and FLAGS.size == 'full':
    return (
      f'JAX sees no GPU here, but {device.device_kind}; --size=tiny '
      'tries the script on any machine.'
    )
  here = {
    'device': device.device_kind,
    'jax': jax.__version__,
    'size': FLAGS.size,
  }
  path = _output() / 'device.json'
  if path.exists() and (there := json.loads(path.read_text())) != here:
    return (
      f'--output={FLAGS.output}: holds results of {there}, and this is '
      f'{here}; name another folder.'
    )
  path.write_text(json.dumps(here))
  return None


def _environment(name: str) -> dict[str, str]:
  """Returns the environment of a stage's process."""
  stage = stages.STAGES[name]
  remedies = [
    row['flags']
    for row in _journal('preflight').rows.values()
    if 'flags' in row
  ]
  autotuned = _output() / 'autotune' / f'{name}.txt'
  autotuned.parent.mkdir(exist_ok=True)
  return os.environ | {
    'XLA_FLAGS': ' '.join(
      (
        os.environ.get('XLA_FLAGS', ''),
        stage.xla_flags,
        f'--xla_gpu_dump_autotune_results_to={autotuned}',
        *remedies,
      )
    ).strip(),
    # A stage that is cut short while it compiles gets on the next time.
    'JAX_COMPILATION_CACHE_DIR': str(_cache()),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    **stage.environment,
  }


def _run_stage(name: str, most_s: float) -> str | None:
  """Runs a stage in its process; returns why it is not done, None if it is."""
  given = [
    f'--{flag}={FLAGS[flag].value}'
    for flag in ('size', 'torch_python', 'hang', 'cache_dir')
    if FLAGS[flag].value
  ]
  logs = _output() / 'logs'
  logs.mkdir(exist_ok=True)
  return processes.run(
    [
      sys.executable,
      '-m',
      'sarathi_jax.benchmarks.gpu.check',
      f'--run_stage={name}',
      f'--output={_output()}',
      *given,
    ],
    _environment(name),
    logs / f'{name}.log',
    _journal(name),
    most_s,
    _ROOT,
  )


def _run_with_remedies(name: str, most_s: float) -> Iterator[str]:
  """Runs a stage, and the preflight until there is no remedy left to try.

  Yields:
    What people are to know.
  """
  while True:
    if (error := _run_stage(name, most_s)) is not None:
      yield f'{name}: {error}'
    if name != 'preflight':
      return
    journal = _journal(name)
    failed = [point for point, row in journal.rows.items() if 'error' in row]
    for remedy in preflight.REMEDIES:
      said = f'remedy: {remedy.name}'
      if (
        remedy.point in failed
        and said not in journal.rows
        and (found := remedy.flags()) is not None
      ):
        break
    else:
      return
    yield (
      f'{remedy.point}: {journal.rows[remedy.point]["error"]}\n'
      f'{said}: from here on with {found}'
    )
    journal.add(said, {'flags': found, 'for': remedy.point})
    for point in failed:
      journal.forget(point)


def _write(console: rich.console.Console) -> targets.Verdicts:
  """Writes all results, and packs them."""
  results = {name: list(_journal(name).rows.values()) for name in stages.STAGES}
  results = {name: rows for name, rows in results.items() if rows}
  path = _output() / 'device.json'
  here = json.loads(path.read_text()) if path.exists() else {'device': '?'}
  verdicts = targets.judge_all(
    results, sizes.SIZES[FLAGS.size].tuned, here['device']
  )
  common.write_json(
    str(_output() / 'gpu_check.json'),
    'gpu.check',
    FLAGS,
    results,
    targets=verdicts.targets,
    **verdicts.comparisons,
    **here,
  )
  left_out = archive.pack(
    {
      _output().name: _output(),
      'autotune_cache': _cache() / 'xla_gpu_per_fusion_autotune_cache_dir',
    },
    _archive(),
  )
  if left_out:
    console.print(f'{_archive()}: no room for {", ".join(left_out)}')
  return verdicts


def _archive() -> pathlib.Path:
  return pathlib.Path(FLAGS.archive or f'{_output()}.tar.gz').resolve()


def main() -> None:
  if not FLAGS.stages:
    raise app.UsageError('--stages=: must name one.')
  if unknown := set(FLAGS.stages) - set(stages.STAGES):
    raise app.UsageError(
      f'--stages={",".join(sorted(unknown))}: must be of '
      f'{", ".join(stages.STAGES)}.'
    )
  if FLAGS.run_stage:
    _run_here(FLAGS.run_stage)
    return
  # Wide, where no terminal says how wide: the tables go to a log.
  console = rich.console.Console(
    highlight=False, width=None if sys.stdout.isatty() else 140
  )
  _output().mkdir(parents=True, exist_ok=True)
  start, failed, took = time.monotonic(), False, list[dict[str, object]]()
  for name in FLAGS.stages:
    left = FLAGS.budget_s - (time.monotonic() - start)
    journal = _journal(name)
    if journal.is_complete and not journal.has_errors and not FLAGS.again:
      console.print(f'{name}: done before, in {_output()}')
      continue
    if left < _LEAST_S:
      console.print(f'{name}: for the next call, as the time is over')
      continue
    if FLAGS.again:
      journal.forget()
    most_s, began = min(left, stages.STAGES[name].most_s), time.monotonic()
    console.print(f'{name}: at most {most_s:.0f} s ...')
    for text in _run_with_remedies(name, most_s):
      console.print(text, markup=False)
    journal = _journal(name)
    seconds = time.monotonic() - began
    took.append(
      {
        'stage': name,
        'seconds': seconds,
        'at most': most_s,
        'rows': len(journal.rows),
        'complete': journal.is_complete,
      }
    )
    tables.show(console, name, list(journal.rows.values()))
    console.print(f'{name}: {seconds:.0f} s')
    failed |= journal.has_errors or not journal.is_complete
    _write(console)
  verdicts = _write(console)
  tables.show_verdicts(console, verdicts)
  tables.show(console, f'seconds, {time.monotonic() - start:.0f} in all', took)
  console.print(f'All of it: {_archive()}', soft_wrap=True)
  if failed:
    sys.exit(1)


if __name__ == '__main__':
  mains.run(main, define_flags, starts_processes=True)
