# SPDX-License-Identifier: Apache-2.0
"""The engine's steps against what the device's memory and arithmetic allow."""

from __future__ import annotations

import dataclasses
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from sarathi_jax import config as config_lib
from sarathi_jax import llm as llm_lib
from sarathi_jax import models
from sarathi_jax import types
from sarathi_jax.benchmarks import throughput
from sarathi_jax.models import config as model_config_lib
from sarathi_jax.runner import device_runner
from sarathi_jax.runner import mesh as mesh_lib


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


def _step_seconds(runner: device_runner.DeviceRunner,
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


def steps(model: model_config_lib.ModelConfig, params: Any,
          limits: dict[str, float], config: config_lib.EngineConfig,
          points: tuple[tuple[str, int, int, int], ...],
          ) -> list[dict[str, Any]]:
  """Times steps of one kind of chunk.

  Args:
    model, params: what is run.
    limits: of `timing.limits`.
    config: with max_num_seqs, max_model_len and token_budget for the points.
    points: (name, sequences, context before, tokens of each).

  Returns:
    Rows. of_floor: the step's time over that of reading weights and keys and
    values once. mfu: of the measured rate of a matmul.
  """
  runner = device_runner.DeviceRunner(
    model, params, mesh_lib.make(), config,
    lambda max_model_len: config.token_budget)
  weights = sum(x.nbytes for x in jax.tree.leaves(params))
  # The embedding is looked up; the head sees a sequence's last token only.
  vocab = params['embed']
  looked_up = 0 if model.tie_word_embeddings else vocab.nbytes
  block_size = sum(x.size for x in jax.tree.leaves(params['layers']))
  per_token = 2 * model.num_layers * model.num_kv_heads * model.head_dim * (
    vocab.dtype.itemsize)
  rows = []
  for name, seqs, before, tokens in points:
    needed = seqs * -(-(before + tokens) // config.page_size)
    if needed > runner.num_pages:
      continue  # Not on this device: its memory does not hold them.
    row = _step_seconds(runner, [
      _chunk(i, before, tokens, config.page_size) for i in range(seqs)])
    floor = (weights - looked_up + seqs * (before + tokens) * per_token) / (
      limits['copy_bytes_per_s'])
    pairs = seqs * (tokens * before + tokens * (tokens + 1) // 2)
    flops = 2 * seqs * (block_size * tokens + vocab.size) + (
      4 * pairs * model.num_layers * model.num_heads * model.head_dim)
    rows.append({
      'step': name, 'sequences': seqs, 'context': before, 'tokens': tokens,
      **row, 'floor_s': floor, 'of_floor': row['step_s'] / floor,
      'mfu': flops / row['step_s'] / limits['matmul_flops_per_s']})
  return rows


def serve(model: model_config_lib.ModelConfig, params: Any,
          config: config_lib.EngineConfig,
          workload: throughput.Workload) -> dict[str, float]:
  """Runs requests, all there at once, on the whole engine."""
  llm = llm_lib.LLM(model, params, config=config)
  throughput.run(llm, dataclasses.replace(workload, num_requests=8), seed=0)
  return throughput.run(llm, workload, seed=1)


def make_params(model: model_config_lib.ModelConfig, dtype: str) -> Any:
  """Random weights, made on the device."""
  make = jax.jit(lambda: models.init_params(
    model, jax.random.key(0), jnp.dtype(dtype), scale=0.02))
  return jax.block_until_ready(make())


