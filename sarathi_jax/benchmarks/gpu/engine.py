# SPDX-License-Identifier: Apache-2.0
"""Times the engine's steps against what memory and arithmetic allow."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import functools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import attention_work
from pallas_kernels import gpu_targets
from sarathi_jax import config as config_lib
from sarathi_jax import llm as llm_lib
from sarathi_jax import models
from sarathi_jax import types
from sarathi_jax.benchmarks import journal as journal_lib
from sarathi_jax.benchmarks import throughput
from sarathi_jax.benchmarks.gpu import idle
from sarathi_jax.benchmarks.gpu import profile
from sarathi_jax.engine import engine as engine_lib
from sarathi_jax.models import config as model_config_lib
from sarathi_jax.runner import device_runner
from sarathi_jax.runner import mesh as mesh_lib
from sarathi_jax.runner import params as params_lib
from sarathi_jax.runner import placement

_TRACED_STEPS = 4
# XLA's choices that are tried one by one, by options of its own; the engine's
# are those of `xla_flags`.
VARIANTS: Mapping[str, Mapping[str, Any]] = {
  'as served': {},
  # Small matmuls cut along what they sum over, with partial sums in float32,
  # where XLA sees fit.
  'split-K': {'xla_gpu_experimental_force_split_k': 0},
  # XLA merges matmuls with one operand in common (q, k, v; gate, up) into one
  # if one of them has less than 32 MiB.
  'matmuls apart': {'xla_gpu_dot_merger_threshold_mb': 0},
  'matmuls merged': {'xla_gpu_dot_merger_threshold_mb': 1024},
  'matmuls apart, by cuBLAS': {
    'xla_gpu_dot_merger_threshold_mb': 0,
    'xla_gpu_enable_triton_gemm': False,
  },
  'loops in no graph': {
    'xla_gpu_enable_command_buffer': 'FUSION,CUBLAS,CUBLASLT,CUDNN,'
    'CUSTOM_CALL,CONDITIONAL'
  },
  'no graphs': {'xla_gpu_enable_command_buffer': ''},
  'as served, again': {},
}


@dataclasses.dataclass(frozen=True, slots=True)
class Point:
  """A step: sequences, each with a context and tokens after it.

  Attributes:
    sequences: their number.
    context, tokens: those of each sequence.
    filtered: whether tokens are drawn with top-k and top-p, or greedily.
    profiled: whether to make a table of its kernels, too.
  """

  sequences: int
  context: int
  tokens: int
  filtered: bool = False
  profiled: bool = False

  @property
  def name(self) -> str:
    kind = 'decode' if self.tokens == 1 else 'prefill'
    end = ', top-k and top-p' if self.filtered else ''
    return f'{kind} {self.sequences} x {self.tokens} after {self.context}{end}'

  def batch(self, page_size: int) -> types.ScheduledBatch:
    """Makes the step's batch, in which each sequence's pages are contiguous."""
    pages = -(-(self.context + self.tokens) // page_size)
    sampling = types.SamplingParams(temperature=0)
    if self.filtered:
      sampling = types.SamplingParams(temperature=1, top_k=50, top_p=0.9)
    chunks = tuple(
      types.Chunk(
        request_id=str(slot),
        slot=slot,
        start=self.context,
        tokens=(1,) * self.tokens,
        num_tokens=self.tokens,
        is_prefill=self.tokens > 1,
        samples=True,
        page_table=tuple(range(slot * pages, (slot + 1) * pages)),
        prompt_len=self.context + self.tokens,
        seed=slot,
        sampling=sampling,
      )
      for slot in range(self.sequences)
    )
    return types.ScheduledBatch(0, chunks, self.sequences * self.tokens)


def make_runner(
  model: model_config_lib.ModelConfig,
  params: Any,
  config: config_lib.EngineConfig,
) -> device_runner.DeviceRunner:
  """Makes a runner that has compiled nothing yet."""
  return device_runner.DeviceRunner(
    model,
    params,
    placement.of_live(params_lib.dtype_of(model, params)),
    mesh_lib.make(),
    config,
    lambda max_model_len: config.token_budget,
    sizes=(),
  )


def make_params(model: model_config_lib.ModelConfig, dtype: str) -> Any:
  """Makes random weights on the device."""
  return jax.block_until_ready(
    models.init_params(model, jax.random.key(0), jnp.dtype(dtype), scale=0.02)
  )


def step_seconds(
  runner: engine_lib.Runner, batch: types.ScheduledBatch
) -> dict[str, float]:
  """Times steps that follow each other, and one that is waited for."""

  def many(n: int) -> float:
    start = time.perf_counter()
    for pending in [runner.launch(batch) for _ in range(n)]:
      runner.fetch(pending)
    return (time.perf_counter() - start) / n

  many(2)
  alone = statistics.median(many(1) for _ in range(9))
  return {
    'step_s': statistics.median(many(10) for _ in range(5)),
    'alone_s': alone,
  }


def steps(
  journal: journal_lib.Journal,
  model: model_config_lib.ModelConfig,
  params: Any,
  limits: Mapping[str, float],
  config: config_lib.EngineConfig,
  points: tuple[Point, ...],
) -> None:
  """Times steps of one kind of chunk, each compiled when its turn comes.

  A row's `of_floor` is the step's time over that of reading weights, keys and
  values once; `of_matmul` is of the measured rate of a matmul, `mfu` of what
  the device's maker says (None where no table has that). Behind a point that
  is to be profiled comes a row with its kernels, (name, calls, microseconds)
  of a step, without CUDA graphs.

  Args:
    journal: takes the rows, and has those of an earlier run.
    model, params: what is run.
    limits: results of `timing.limits` on this device.
    config: has max_num_seqs, max_model_len, num_pages and token_budget for the
      points.
    points: what is timed.
  """
  runner = functools.cache(lambda: make_runner(model, params, config))
  work = Work.of(model, params)
  peak = gpu_targets.matmul_flops(jax.devices()[0].device_kind)

  @functools.cache
  def compiled(program: int) -> float:
    start = time.perf_counter()
    runner().compile(program)
    return time.perf_counter() - start

  def row(point: Point) -> journal_lib.Row:
    needed = point.sequences * -(
      -(point.context + point.tokens) // config.page_size
    )
    if needed > runner().num_pages:
      return {'left_out': f'{needed} pages needed, {runner().num_pages} there'}
    batch = point.batch(config.page_size)
    compile_s = compiled(runner().program_for(batch))
    times = step_seconds(runner(), batch)
    floor = work.num_bytes(point) / limits['copy_bytes_per_s']
    rate = work.flops(point) / times['step_s']
    return {
      'sequences': point.sequences,
      'context': point.context,
      'tokens': point.tokens,
      **times,
      'floor_s': floor,
      'of_floor': times['step_s'] / floor,
      'of_matmul': rate / limits['matmul_flops_per_s'],
      'mfu': rate / peak if peak else None,
      'compile_s': compile_s,
    }

  def kernels(point: Point) -> journal_lib.Row:
    batch = point.batch(config.page_size)
    compiled(runner().program_for(batch))

    def run() -> None:
      for _ in range(_TRACED_STEPS):
        runner().fetch(runner().launch(batch))

    run()
    try:
      table = profile.kernels(profile.traced(run), _TRACED_STEPS)
    except Exception as error:  # The profiler is a guest.
      return journal_lib.absent(error)
    return (
      {'kernels': table} if table else {'absent': 'a profile shows no device'}
    )

  for point in points:
    journal.measure(point.name, functools.partial(row, point))
    if point.profiled and 'step_s' in journal.rows[point.name]:
      journal.measure(
        f'kernels, {point.name}', functools.partial(kernels, point)
      )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Work:
  """What a step of a model has to do, at least.

  Attributes:
    read_bytes: bytes of weights, without the embedding, which is looked up.
    kv_bytes: bytes of a token's keys and values, all layers.
    token_flops: operations of a token's matrices, all layers but what nobody
      reads.
    last_flops: operations that only tokens that are sampled from go through.
    pair_flops: operations of a query with a key, in one layer.
    num_layers: layers of the model.
  """

  read_bytes: int
  kv_bytes: int
  token_flops: int
  last_flops: int
  pair_flops: int
  num_layers: int

  @classmethod
  def of(cls, model: model_config_lib.ModelConfig, params: Any) -> Work:
    """Returns the work of a model with these weights."""
    vocab, last = params['embed'], params['layers'][-1]
    looked_up = 0 if model.tie_word_embeddings else vocab.nbytes
    # The last layer only makes keys and values of all but a sequence's last
    # token.
    left_out = _size(last) - sum(last['attn'][name].size for name in 'kv')
    return cls(
      read_bytes=sum(x.nbytes for x in jax.tree.leaves(params)) - looked_up,
      kv_bytes=model.num_layers
      * attention_work.token_bytes(
        model.num_kv_heads,
        model.head_dim,
        params_lib.dtype_of(model, params).name,
      ),
      token_flops=2 * (_size(params['layers']) - left_out),
      last_flops=2 * (left_out + vocab.size),
      pair_flops=attention_work.pair_flops(model.num_heads, model.head_dim),
      num_layers=model.num_layers,
    )

  def num_bytes(self, point: Point) -> int:
    """Counts the bytes that are to be read once."""
    return self.read_bytes + point.sequences * self.kv_bytes * (
      point.context + point.tokens
    )

  def flops(self, point: Point) -> int:
    """Counts multiplications and additions."""
    before, tokens = point.context, point.tokens
    pairs = (before + tokens) + (
      self.num_layers - 1
    ) * attention_work.num_pairs(before, tokens)
    return point.sequences * (
      tokens * self.token_flops + self.last_flops + pairs * self.pair_flops
    )


def _size(tree: Any) -> int:
  return sum(x.size for x in jax.tree.leaves(tree))


def variants(
  journal: journal_lib.Journal,
  model: model_config_lib.ModelConfig,
  params: Any,
  config: config_lib.EngineConfig,
  point: Point,
) -> None:
  """Times one step as XLA compiles it by other choices, see `VARIANTS`.

  A row's `over` is its time over that of the first; `tokens` are those that
  it drew with filters, whose branches and loops these choices are about.

  Args:
    journal, model, params, config: as for `steps`.
    point: the step.
  """
  runner = functools.cache(lambda: make_runner(model, params, config))
  batch = point.batch(config.page_size)
  drawn = dataclasses.replace(point, filtered=True).batch(config.page_size)

  def row(options: Mapping[str, Any]) -> journal_lib.Row:
    start = time.perf_counter()
    try:
      runner().compile(runner().program_for(batch), options)
    except jax.errors.JaxRuntimeError as error:  # Not with this XLA.
      return journal_lib.absent(error)
    compile_s = time.perf_counter() - start
    times = step_seconds(runner(), batch)
    first = journal.rows.get('as served', times).get('step_s')
    return {
      **times,
      'over': times['step_s'] / first if first else None,
      'filtered_s': step_seconds(runner(), drawn)['step_s'],
      'compile_s': compile_s,
      'tokens': runner().fetch(runner().launch(drawn)).tokens,
    }

  for name, options in VARIANTS.items():
    journal.measure(name, functools.partial(row, options))


def whole_engine(
  journal: journal_lib.Journal,
  model: model_config_lib.ModelConfig,
  params: Any,
  config: config_lib.EngineConfig,
  workload: throughput.Workload,
  decode: Point,
) -> None:
  """Runs the engine's loop: a workload, and decodes to compare with a step.

  Args:
    journal: as for `steps`.
    model, params, config: what is run.
    workload: requests, all there at once.
    decode: the point in which to look for idle time.
  """
  llm = functools.cache(
    lambda: llm_lib.LLM(
      model, params, config=config, eos_token_ids=(), on_compiled=_say_compiled
    )
  )

  def serve() -> journal_lib.Row:
    throughput.run(llm(), dataclasses.replace(workload, num_requests=8), 0)
    return throughput.run(llm(), workload, seed=1)

  def gap() -> journal_lib.Row:
    seen = idle.decode_steps(llm().engine, decode.sequences, decode.context)
    step = step_seconds(
      llm().engine._runner,
      dataclasses.replace(decode, context=seen.context).batch(config.page_size),
    )['step_s']
    return {
      'context': seen.context,
      'wall_s': seen.wall_s,
      'step_s': step,
      'idle': max(0.0, 1 - step / seen.wall_s),
      'traced_idle': seen.idle,
    }

  journal.measure('serving', serve)
  journal.measure(f'engine, {decode.name}', gap)


def _say_compiled(done: int, total: int) -> None:
  """Notes in the stage's log what is compiled, and kept for the next run."""
  print(f'{done} of {total} steps compiled', flush=True)
