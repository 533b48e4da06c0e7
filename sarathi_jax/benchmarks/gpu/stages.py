# SPDX-License-Identifier: Apache-2.0
"""The stages of `scripts/gpu_check`, and how much each measures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import functools
import os
import pathlib
import re
import subprocess
import sys

from absl import flags

from sarathi_jax import config as config_lib
from sarathi_jax.benchmarks import live_capacity
from sarathi_jax.benchmarks import throughput
from sarathi_jax.benchmarks.gpu import attention
from sarathi_jax.benchmarks.gpu import engine
from sarathi_jax.benchmarks.gpu import journal as journal_lib
from sarathi_jax.benchmarks.gpu import timing
from sarathi_jax.benchmarks.gpu import tune
from sarathi_jax.models import config as model_config_lib
from sarathi_jax.simulator import search
from sarathi_jax.simulator import workload as workload_lib

_ROOT = pathlib.Path(__file__).parents[3]
Point = engine.Point


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Size:
  """How much is measured."""

  model: model_config_lib.ModelConfig
  dtype: str
  sweep: attention.Sweep
  quantized: tuple[attention.Sweep, ...]
  mosaic: attention.Sweep
  tuned: attention.Sweep
  copy_bytes: int
  matmul_n: int
  config: config_lib.EngineConfig
  points: tuple[Point, ...]
  idle: Point
  workload: throughput.Workload
  attention: str
  dense: str | None
  chats: workload_lib.WorkloadConfig
  capacity_rows: tuple[str, ...]
  most_tried: int | None = None
  written: tuple[int, ...] = (64, 512, 2048)
  tests: tuple[str, ...] = ('tests/pallas_kernels', '-m', 'gpu')


SIZES: Mapping[str, Size] = {
  'full': Size(
    model=throughput.MODELS['mistral-7b'], dtype='bfloat16',
    sweep=attention.Sweep(),
    quantized=tuple(attention.Sweep(
      kv_dtype=kept, pool_tokens=2**20, decode_seqs=(1, 64, 256),
      decode_contexts=(2048, 32768), chunks=(2048,), chunk_contexts=(0, 8192),
      hybrids=()) for kept in ('int8', 'float8_e4m3fn')),
    # Decodes are the other kernel's: what the launch more costs them.
    mosaic=attention.Sweep(
      decode_seqs=(1, 64), decode_contexts=(512, 2048)),
    tuned=attention.Sweep(
      pool_tokens=2**20, decode_seqs=(64,), decode_contexts=(2048,),
      chunks=(2048,), chunk_contexts=(4096,), hybrids=()),
    copy_bytes=2**31, matmul_n=8192, dense='cudnn',
    attention='pallas_triton',
    workload=throughput.Workload(
      num_requests=256, prompt_lens=(32, 128, 512),
      output_lens=(16, 64, 128)),
    config=config_lib.EngineConfig(
      token_budget=2048, max_num_seqs=128, max_model_len=4096,
      num_pages=2304),
    points=(Point(64, 2047, 1), Point(1, 0, 512), Point(1, 0, 2048),
            Point(1, 2047, 1), Point(128, 1023, 1), Point(1, 2048, 512)),
    idle=Point(64, 2047, 1),
    chats=workload_lib.WorkloadConfig(num_requests=96),
    capacity_rows=('vllm', 'sarathi 512', 'sarathi 2048', 'auto')),
  'tiny': Size(
    model=model_config_lib.LlamaConfig(
      vocab_size=256, hidden_size=64, intermediate_size=96, num_layers=1,
      num_heads=4, num_kv_heads=2, head_dim=16, max_position_embeddings=256),
    dtype='float32', copy_bytes=2**20, matmul_n=128, dense='xla',
    attention='xla',  # Interpreted, the kernel takes a minute.
    sweep=attention.Sweep(
      num_heads=4, num_kv_heads=2, head_dim=16, dtype='float32', page_size=16,
      pool_tokens=512, decode_seqs=(4,), decode_contexts=(64,),
      chunks=(32,), chunk_contexts=(0, 64), hybrids=((4, 64, 16, 16),),
      calls=1),
    quantized=(attention.Sweep(
      num_heads=4, num_kv_heads=2, head_dim=16, dtype='float32', page_size=16,
      kv_dtype='int8', pool_tokens=256, decode_seqs=(4,),
      decode_contexts=(64,), chunks=(), hybrids=(), calls=1),),
    mosaic=attention.Sweep(
      num_heads=2, num_kv_heads=1, head_dim=64, page_size=16,
      pool_tokens=256, decode_seqs=(), chunks=(32,), chunk_contexts=(0,),
      hybrids=(), calls=1),
    tuned=attention.Sweep(
      num_heads=2, num_kv_heads=1, head_dim=16, dtype='float32', page_size=32,
      pool_tokens=256, decode_seqs=(1,), decode_contexts=(32,), chunks=(),
      hybrids=(), calls=1),
    config=config_lib.EngineConfig(
      token_budget=32, max_num_seqs=8, max_model_len=256, num_pages=64),
    points=(Point(4, 63, 1), Point(1, 0, 32)), idle=Point(4, 63, 1),
    workload=throughput.Workload(
      num_requests=4, prompt_lens=(8, 64), output_lens=(4, 8)),
    chats=workload_lib.WorkloadConfig(num_requests=4, length_scale=0.01),
    capacity_rows=('vllm', 'auto'), most_tried=2, written=(4,),
    tests=('tests/pallas_kernels/gpu_targets_test.py',)),
}


def _tests(size: Size, journal: journal_lib.Journal) -> None:
  """The tests that a GPU can run, less those that passed before."""
  passed = [f'--deselect={test}' for test in journal.rows if test in journal]
  with subprocess.Popen(
      # What a newer JAX warns of is no failure of a GPU.
      [sys.executable, '-m', 'pytest', '-v', '-p', 'no:cacheprovider',
       '-W', 'default', *size.tests, *passed], cwd=_ROOT,
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
    assert process.stdout
    line = ''
    for line in process.stdout:
      print(line, end='')  # Into the log, where the failures' reasons are.
      if match := re.match(r'(\S+::.*?) (PASSED|FAILED|ERROR)\b', line):
        journal.add(match[1], {} if match[2] == 'PASSED' else {
          'error': match[2].lower()})
  # 5: none was left to run.
  if process.returncode not in (0, 1, 5) or not journal.rows:
    raise RuntimeError(
      f'pytest: exit status {process.returncode}: {line.strip()}')


def _limits(size: Size, journal: journal_lib.Journal) -> None:
  journal.measure('limits', lambda: dict(
    timing.limits(size.copy_bytes, size.matmul_n)))


def _attention(size: Size, journal: journal_lib.Journal) -> None:
  attention.run(
    journal, size.sweep, timing.limits(size.copy_bytes, size.matmul_n),
    size.attention, size.dense)


def _quantized(size: Size, journal: journal_lib.Journal) -> None:
  limits = timing.limits(size.copy_bytes, size.matmul_n)
  for sweep in size.quantized:
    attention.run(journal, sweep, limits, size.attention, None)


def _mosaic(size: Size, journal: journal_lib.Journal) -> None:
  attention.run_mosaic(
    journal, size.mosaic, timing.limits(size.copy_bytes, size.matmul_n))


def _write(size: Size, journal: journal_lib.Journal) -> None:
  tune.writes(journal, size.tuned, size.written)


def _tune(size: Size, journal: journal_lib.Journal) -> None:
  tune.sizes(journal, size.tuned, size.most_tried)


def _torch(size: Size, journal: journal_lib.Journal) -> None:
  os.environ['XLA_PYTHON_CLIENT_PREALLOCATE'] = 'false'  # torch takes it.
  attention.run_torch(
    journal, size.sweep, flags.FLAGS.torch_python or sys.executable)


def _engine(size: Size, journal: journal_lib.Journal) -> None:
  params = engine.make_params(size.model, size.dtype)
  engine.steps(
    journal, size.model, params, timing.limits(size.copy_bytes, size.matmul_n),
    size.config, size.points)
  engine.whole_engine(
    journal, size.model, params, size.config, size.workload, size.idle)


def _capacity(size: Size, journal: journal_lib.Journal) -> None:
  setup = live_capacity.Setup(
    model=size.model, params=engine.make_params(size.model, size.dtype),
    workload=size.chats, config=dataclasses.replace(
      size.config, num_pages=None,
      max_model_len=live_capacity.max_model_len(size.chats)))
  # One SLO for all rows, if they are of several runs, too.
  journal.measure('strict SLO', lambda: {
    'slo_tbt_p99_s': live_capacity.strict_slo_s(setup)})
  slo_s = journal.rows['strict SLO'].get('slo_tbt_p99_s')
  for name in size.capacity_rows if slo_s else ():
    journal.measure(name, functools.partial(
      live_capacity.search_row, setup, name,
      search.Slo(p99_tbt_s=float(slo_s or 0)), start=4.0,
      precision=0.2))


STAGES: Mapping[str, Callable[[Size, journal_lib.Journal], None]] = {
  'limits': _limits, 'engine': _engine, 'attention': _attention,
  'tests': _tests, 'torch': _torch, 'mosaic': _mosaic,
  'no_graphs': _engine, 'xla_graphs': _engine, 'capacity': _capacity,
  'quantized': _quantized, 'write': _write, 'tune': _tune}
# Seconds of what may hang, as it never ran, and is not to take the others'.
MOST_S: Mapping[str, float] = {'engine': 240, 'tests': 120, 'mosaic': 100}
_PROFILED = '--xla_enable_command_buffers_during_profiling=true'
# What a stage has in XLA_FLAGS after the engine's own.
XLA_FLAGS: Mapping[str, str] = {
  'engine': _PROFILED,
  'xla_graphs': f'{_PROFILED} --xla_gpu_enable_command_buffer=-WHILE',
  'no_graphs': '--xla_gpu_enable_command_buffer='}
