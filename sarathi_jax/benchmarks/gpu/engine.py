# SPDX-License-Identifier: Apache-2.0
"""The engine's steps against what the device's memory and arithmetic allow."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import gpu_targets
from sarathi_jax import config as config_lib
from sarathi_jax import llm as llm_lib
from sarathi_jax import models
from sarathi_jax import types
from sarathi_jax.benchmarks import throughput
from sarathi_jax.benchmarks.gpu import idle
from sarathi_jax.benchmarks.gpu import journal as journal_lib
from sarathi_jax.models import config as model_config_lib
from sarathi_jax.runner import device_runner
from sarathi_jax.runner import mesh as mesh_lib


@dataclasses.dataclass(frozen=True, slots=True)
class Point:
  """A step: sequences, each with a context and tokens after it."""

  sequences: int
  context: int
  tokens: int

  @property
  def name(self) -> str:
    kind = 'decode' if self.tokens == 1 else 'prefill'
    return f'{kind} {self.sequences} x {self.tokens} after {self.context}'


def _chunk(slot: int, start: int, num_tokens: int,
           page_size: int) -> types.Chunk:
  """Tokens of a sequence whose pages lie in a row, behind those before it."""
  pages = -(-(start + num_tokens) // page_size)
  return types.Chunk(
    request_id=str(slot), slot=slot, start=start, tokens=(1,) * num_tokens,
    num_tokens=num_tokens, is_prefill=num_tokens > 1, samples=True,
    page_table=tuple(range(slot * pages, (slot + 1) * pages)),
    prompt_len=start + num_tokens, seed=0,
    sampling=types.SamplingParams(temperature=0))


def _step_seconds(runner: Any,  # a DeviceRunner
                  chunks: list[types.Chunk]) -> dict[str, float]:
  """A step when steps follow each other, and one that is waited for."""
  batch = types.ScheduledBatch(
    0, tuple(chunks), sum(c.num_tokens for c in chunks))

  def many(n: int) -> float:
    start = time.perf_counter()
    pending = [runner.launch(batch) for _ in range(n)]
    runner.fetch(pending[-1])
    return (time.perf_counter() - start) / n

  many(2)
  alone = statistics.median(many(1) for _ in range(9))
  return {'step_s': statistics.median(many(10) for _ in range(5)),
          'alone_s': alone}


def steps(journal: journal_lib.Journal,
          model: model_config_lib.ModelConfig, params: Any,
          limits: dict[str, float], config: config_lib.EngineConfig,
          points: tuple[Point, ...]) -> None:
  """Times steps of one kind of chunk.

  A row's `of_floor` is the step's time over that of reading weights, keys and
  values once; `of_matmul` is of the measured rate of a matmul, `mfu` of what
  the device's maker says (None where no table has that).

  Args:
    journal: which takes the rows, and has those of an earlier run.
    model, params: what is run.
    limits: of `timing.limits`, of this run.
    config: with max_num_seqs, max_model_len and token_budget for the points.
    points: what is timed.
  """
  runner = functools.cache(lambda: device_runner.DeviceRunner(
    model, params, mesh_lib.make(), config,
    lambda max_model_len: config.token_budget, _say_compiled))
  peak = gpu_targets.matmul_flops(jax.devices()[0].device_kind)
  weights = sum(x.nbytes for x in jax.tree.leaves(params))
  # The embedding is looked up; the head sees a sequence's last token only.
  vocab = params['embed']
  looked_up = 0 if model.tie_word_embeddings else vocab.nbytes
  block_size = sum(x.size for x in jax.tree.leaves(params['layers']))
  # Of all but a sequence's last token, the last layer has keys and values.
  last = params['layers'][-1]
  left_out = sum(x.size for x in jax.tree.leaves(last)) - sum(
    last['attn'][name].size for name in 'kv')
  per_token = 2 * model.num_layers * model.num_kv_heads * model.head_dim * (
    vocab.dtype.itemsize)

  def row(point: Point) -> journal_lib.Row:
    seqs, before, tokens = point.sequences, point.context, point.tokens
    needed = seqs * -(-(before + tokens) // config.page_size)
    if needed > runner().num_pages:
      return {'left_out': f'{needed} pages needed, {runner().num_pages} there'}
    times = _step_seconds(runner(), [
      _chunk(i, before, tokens, config.page_size) for i in range(seqs)])
    floor = (weights - looked_up + seqs * (before + tokens) * per_token) / (
      limits['copy_bytes_per_s'])
    pairs = (before + tokens) + (model.num_layers - 1) * (
      tokens * before + tokens * (tokens + 1) // 2)
    flops = seqs * (
      2 * (block_size * tokens - left_out * (tokens - 1) + vocab.size)
      + 4 * pairs * model.num_heads * model.head_dim)
    return {
      **dataclasses.asdict(point), **times, 'floor_s': floor,
      'of_floor': times['step_s'] / floor,
      'of_matmul': flops / times['step_s'] / limits['matmul_flops_per_s'],
      'mfu': flops / times['step_s'] / peak if peak else None}

  for point in points:
    journal.measure(point.name, functools.partial(row, point))


def whole_engine(journal: journal_lib.Journal,
                 model: model_config_lib.ModelConfig, params: Any,
                 config: config_lib.EngineConfig,
                 workload: throughput.Workload, decode: Point) -> None:
  """The engine's loop: a workload, and decodes held against their step.

  Args:
    journal: as of `steps`.
    model, params, config: what is run.
    workload: requests, all there at once.
    decode: which of the points to look for idle time in.
  """
  llm = functools.cache(lambda: llm_lib.LLM(
    model, params, config=config, on_compiled=_say_compiled))

  def serve() -> journal_lib.Row:
    throughput.run(llm(), dataclasses.replace(workload, num_requests=8), 0)
    return throughput.run(llm(), workload, seed=1)

  def gap() -> journal_lib.Row:
    seen = idle.decode_steps(llm().engine, decode.sequences, decode.context)
    step = _step_seconds(llm().engine._runner, [
      _chunk(i, seen.context, 1, config.page_size)
      for i in range(decode.sequences)])['step_s']
    return {'context': seen.context, 'wall_s': seen.wall_s, 'step_s': step,
            'idle': max(0.0, 1 - step / seen.wall_s), 'traced_idle': seen.idle}

  def sampled() -> journal_lib.Row:
    # Held against the same without graphs, whose branches and loops these are.
    done = llm().generate(
      [[1 + i] * 16 for i in range(config.max_num_seqs)],
      [types.SamplingParams(temperature=1, top_k=50, top_p=0.9, seed=i,
                            max_tokens=1) for i in range(config.max_num_seqs)])
    return {'tokens': [d.token_ids[0] for d in done]}

  journal.measure('sampled tokens', sampled)
  journal.measure('serving', serve)
  journal.measure(f'engine, {decode.name}', gap)


def _say_compiled(done: int, total: int) -> None:
  """Into the stage's log: what is compiled is kept for the next run."""
  print(f'{done} of {total} steps compiled', flush=True)


def make_params(model: model_config_lib.ModelConfig, dtype: str) -> Any:
  """Random weights, made on the device."""
  make = jax.jit(lambda: models.init_params(
    model, jax.random.key(0), jnp.dtype(dtype), scale=0.02))
  return jax.block_until_ready(make())


