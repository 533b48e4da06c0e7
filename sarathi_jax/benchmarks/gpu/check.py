# SPDX-License-Identifier: Apache-2.0
"""All that only a GPU can show; stops before nine minutes are over.

  scripts/gpu_check --output=results

Stages: `tests` (those marked gpu), `limits` (what a copy and a matmul reach
on this device), `attention` (the kernel's sweep), `engine` (steps and serving
on random weights), `no_graphs` (the same without command buffers, as XLA
calls CUDA graphs). Each runs in a process of its own. What is done stays in
`gpu_check.json`, so that a run that was cut short goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

from absl import app
from absl import flags
import jax
import rich.console
import rich.progress
import rich.table

from sarathi_jax import config as config_lib
from sarathi_jax.benchmarks import common
from sarathi_jax.benchmarks import throughput
from sarathi_jax.benchmarks.gpu import attention
from sarathi_jax.benchmarks.gpu import engine
from sarathi_jax.benchmarks.gpu import timing

FLAGS = flags.FLAGS
_ROOT = pathlib.Path(__file__).parents[3]
Rows = list[dict[str, Any]]


def define_flags() -> None:
  flags.DEFINE_string('output', 'gpu_check', 'Folder of gpu_check.json.')
  flags.DEFINE_list('stages', list(STAGES), 'What to run, in this order.')
  flags.DEFINE_bool('again', False, 'Run stages that were done, too.')
  flags.DEFINE_float('budget_s', 530, 'No stage is begun after, or goes on.')
  flags.DEFINE_enum('size', 'full', list(_SIZES), "'tiny' tries the script.")
  flags.DEFINE_string('run_stage', None, 'Of the script itself.')


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Size:
  """How much is measured."""

  model: str
  dtype: str
  sweep: attention.Sweep
  copy_bytes: int
  matmul_n: int
  config: config_lib.EngineConfig
  points: tuple[tuple[str, int, int, int], ...]
  workload: throughput.Workload
  dense: str | None


_SIZES: Mapping[str, Size] = {
  'full': Size(
    model='mistral-7b', dtype='bfloat16', sweep=attention.Sweep(),
    copy_bytes=2**31, matmul_n=8192, dense='cudnn',
    workload=throughput.Workload(
      num_requests=256, prompt_lens=(32, 128, 512),
      output_lens=(16, 64, 128)),
    config=config_lib.EngineConfig(
      token_budget=2048, max_num_seqs=128, max_model_len=4096,
      num_pages=2112),
    points=(('decode', 1, 2047, 1), ('decode', 64, 2047, 1),
            ('decode', 128, 1023, 1), ('prefill 512', 1, 0, 512),
            ('prefill 512', 1, 2048, 512), ('prefill 2048', 1, 0, 2048))),
  'tiny': Size(
    model='43m', dtype='float32', copy_bytes=2**20, matmul_n=128, dense=None,
    sweep=attention.Sweep(
      num_heads=4, num_kv_heads=2, head_dim=16, dtype='float32', page_size=16,
      pool_tokens=512, decode_seqs=(1, 4), decode_contexts=(64,),
      chunks=(32,), chunk_contexts=(0, 64), hybrids=((4, 64, 16, 16),)),
    config=config_lib.EngineConfig(
      token_budget=32, max_num_seqs=8, max_model_len=256, num_pages=64),
    points=(('decode', 4, 63, 1), ('prefill 32', 1, 0, 32)),
    workload=throughput.Workload(
      num_requests=4, prompt_lens=(8, 64), output_lens=(4, 8))),
}


def _tests(size: Size) -> Rows:
  """The tests that a GPU can run."""
  del size
  done = subprocess.run(
    [sys.executable, '-m', 'pytest', '-q', '-m', 'gpu', '-x',
     '-p', 'no:cacheprovider', 'tests/pallas_kernels'],
    check=False, cwd=_ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    text=True)
  return [{'exit status': done.returncode,
           'last lines': done.stdout[-2000:].strip()}]


def _limits(size: Size) -> Rows:
  return [timing.limits(size.copy_bytes, size.matmul_n)]


def _attention(size: Size) -> Rows:
  (limits,) = _limits(size)
  return attention.run(size.sweep, limits, 'pallas_triton', size.dense,
                       on_row=lambda: None)


def _engine(size: Size) -> Rows:
  # Its two engines have the steps in common, and so have later runs.
  jax.config.update('jax_compilation_cache_dir', os.path.join(
    config_lib.default_cache_dir(), 'gpu_check'))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  (limits,) = _limits(size)
  model = throughput.MODELS[size.model]
  params = engine.make_params(model, size.dtype)
  rows = engine.steps(model, params, limits, size.config, size.points)
  served = engine.serve(model, params, size.config, size.workload)
  return [*rows, {'step': 'serving', **served}]


STAGES: Mapping[str, Callable[[Size], Rows]] = {
  'tests': _tests, 'limits': _limits, 'attention': _attention,
  'engine': _engine, 'no_graphs': _engine}
_STAGE_ENV = {'no_graphs': '--xla_gpu_enable_command_buffer='}


def _run_stage(name: str, seconds: float) -> Rows:
  """A stage in a process of its own.

  Raises:
    RuntimeError: it failed, or took too long; says what it printed.
  """
  with tempfile.NamedTemporaryFile('r') as answer, (
      tempfile.TemporaryFile('w+')) as log:
    flag = f'{os.environ.get("XLA_FLAGS", "")} {_STAGE_ENV.get(name, "")}'
    process = subprocess.Popen(
      [sys.executable, '-m', 'sarathi_jax.benchmarks.gpu.check',
       f'--run_stage={name}', f'--size={FLAGS.size}',
       f'--output={answer.name}'],
      cwd=_ROOT, stdout=log, stderr=log, start_new_session=True,
      env=os.environ | {'XLA_FLAGS': flag.strip()})
    try:
      ended = f'exit status {process.wait(seconds)}'
    except subprocess.TimeoutExpired:
      ended = f'stopped after {seconds:.0f} s'
    finally:  # With all that it started, which holds the GPU's memory.
      with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    if ended != 'exit status 0':
      log.seek(0)
      raise RuntimeError(f'{name}: {ended}: {log.read()[-3000:]}')
    rows: Rows = json.load(answer)
    return rows


def _show(console: rich.console.Console, title: str, rows: Rows) -> None:
  # Rows of a kind have their columns in common: one table for each kind.
  kinds: dict[tuple[str, ...], Rows] = {}
  for row in rows:
    columns = tuple(k for k in row if k != 'dense_over_ours')
    kinds.setdefault(columns, []).append(row)
  for shared, same in kinds.items():
    columns = shared
    if any('dense_over_ours' in row for row in same):
      columns = (*shared, 'dense_over_ours')
    table = rich.table.Table(*columns, title=title)
    for row in same:
      table.add_row(*(
        f'{v:,.4g}' if isinstance(v, float) else str(v)
        for v in (row.get(c, '') for c in columns)))
    console.print(table)


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unexpected argument: {argv[1]}')
  if unknown := set(FLAGS.stages) - set(STAGES):
    raise app.UsageError(
      f'--stages={",".join(sorted(unknown))}: must be of {", ".join(STAGES)}.')
  if FLAGS.run_stage:
    rows = STAGES[FLAGS.run_stage](_SIZES[FLAGS.size])
    pathlib.Path(FLAGS.output).write_text(json.dumps(rows))
    return
  # Wide, where no terminal says how wide: the tables go to a log.
  console = rich.console.Console(
    highlight=False, width=None if sys.stdout.isatty() else 140)
  # Asked in a process of its own: this one must leave the memory alone.
  device = subprocess.run(
    [sys.executable, '-c',
     'import jax; d = jax.devices()[0]; print(d.platform, d.device_kind)'],
    stdout=subprocess.PIPE, text=True, check=True).stdout.split(maxsplit=1)
  if device[0] != 'gpu' and FLAGS.size == 'full':
    raise app.UsageError(
      f'JAX sees no GPU here, but {device[1].strip()}; --size=tiny tries the '
      'script on any machine.')
  folder = pathlib.Path(FLAGS.output)
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / 'gpu_check.json'
  done = json.loads(path.read_text())['results'] if path.exists() else {}
  start, failed = time.monotonic(), False
  for name in FLAGS.stages:
    left = FLAGS.budget_s - (time.monotonic() - start)
    passed = name in done and not any(
      row.get('exit status') for row in done[name])
    if passed and not FLAGS.again:
      console.print(f'{name}: done before, in {path}')
    elif left < 10:
      console.print(f'{name}: no time left; run again to go on.')
      failed = True
      continue
    else:
      try:
        with console.status(f'{name} (at most {left:.0f} s)'):
          done[name] = _run_stage(name, left)
      except RuntimeError as error:
        console.print(str(error), markup=False)
        failed = True
        continue
      common.write_json(str(path), 'gpu.check', FLAGS, done,
                        device=device[1].strip(), jax=jax.__version__)
    _show(console, name, done[name])
    failed |= any(row.get('exit status') for row in done[name])
  console.print(f'{path}, after {time.monotonic() - start:.0f} s.')
  if failed:
    sys.exit(1)


if __name__ == '__main__':
  define_flags()
  app.run(main)
