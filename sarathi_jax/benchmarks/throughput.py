# SPDX-License-Identifier: Apache-2.0
"""Measures tokens a second of the whole engine, on a model of random weights.

  python -m sarathi_jax.benchmarks.throughput --model=43m --num_requests=32

Random prompts of the given lengths come all at once, and are continued
greedily. The first run warms up; the others are measured, each on fresh
prompts.
"""

from __future__ import annotations

import dataclasses
import os
import random
import time

from absl import flags
from absl import logging
import jax
import jax.numpy as jnp
import rich.console
import rich.progress
import rich.table

from sarathi_jax import config as config_lib
from sarathi_jax import llm as llm_lib
from sarathi_jax import models
from sarathi_jax import types
from sarathi_jax import xla_flags
from sarathi_jax.benchmarks import common
from sarathi_jax.cli import flags as engine_flags
from sarathi_jax.cli import mains
from sarathi_jax.models import config as model_config_lib
from sarathi_jax.models import published

FLAGS = flags.FLAGS


def _llama(
  layers: int,
  hidden: int,
  mlp: int,
  heads: int,
  kv_heads: int,
  vocab: int,
  context: int,
) -> model_config_lib.LlamaConfig:
  return model_config_lib.LlamaConfig(
    vocab_size=vocab,
    hidden_size=hidden,
    intermediate_size=mlp,
    num_layers=layers,
    num_heads=heads,
    num_kv_heads=kv_heads,
    head_dim=hidden // heads,
    max_position_embeddings=context,
  )


MODELS = {
  '22m': _llama(6, 512, 1376, 8, 4, 4096, 2048),
  '43m': _llama(12, 512, 1376, 8, 4, 8192, 2048),
  '150m': _llama(12, 1024, 2752, 16, 4, 8192, 2048),
  **published.MODELS,
}


def define_flags() -> None:
  flags.DEFINE_enum('model', '43m', list(MODELS), 'Shape of the model.')
  flags.DEFINE_integer('num_requests', 32, 'Requests of each run.')
  flags.DEFINE_list(
    'prompt_lens',
    ['32', '64', '128', '256'],
    'Lengths of prompts to draw from, tokens.',
  )
  flags.DEFINE_list(
    'output_lens',
    ['32', '64', '128'],
    'Lengths of outputs to draw from, tokens.',
  )
  flags.DEFINE_integer('runs', 3, 'Number of runs to measure.')
  flags.DEFINE_string('json', None, 'File to write the results to, as JSON.')
  engine_flags.define_engine_flags()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
  """Requests that all come at once; lengths in tokens, to draw from."""

  num_requests: int
  prompt_lens: tuple[int, ...]
  output_lens: tuple[int, ...]


def run(
  llm: llm_lib.LLM,
  workload: Workload,
  seed: int,
) -> dict[str, float | None]:
  """Runs random prompts, fresh for every seed; returns the run's numbers."""
  rng = random.Random(seed)
  prompts, sampling = [], []
  for _ in range(workload.num_requests):
    prompts.append(
      [
        rng.randrange(llm.model.vocab_size)
        for _ in range(rng.choice(workload.prompt_lens))
      ]
    )
    sampling.append(
      types.SamplingParams(
        temperature=0,
        ignore_eos=True,
        max_tokens=rng.choice(workload.output_lens),
      )
    )
  metrics = llm.engine.metrics
  num_steps, wait_s = metrics.num_steps, metrics.wait_s
  earlier = metrics.ttft_s.copy(), metrics.tbt_s.copy()
  start = time.perf_counter()
  done = llm.generate(prompts, sampling)
  seconds = time.perf_counter() - start
  num_steps, wait_s = metrics.num_steps - num_steps, metrics.wait_s - wait_s
  output, prompt = (
    sum(map(len, x)) for x in ([d.token_ids for d in done], prompts)
  )
  ttft, tbt = (
    values.since(before)
    for values, before in zip(
      (metrics.ttft_s, metrics.tbt_s), earlier, strict=True
    )
  )
  return {
    'seconds': seconds,
    'output_tokens': output,
    'prompt_tokens': prompt,
    'output_tokens_per_s': output / seconds,
    'prompt_tokens_per_s': prompt / seconds,
    'steps': num_steps,
    'step_ms': seconds / num_steps * 1e3,
    'host_ms_per_step': (seconds - wait_s) / num_steps * 1e3,
    'ttft_p50_s': ttft.quantile(0.5),
    'ttft_p99_s': ttft.quantile(0.99),
    'tbt_p50_s': tbt.quantile(0.5),
    'tbt_p99_s': tbt.quantile(0.99),
  }


def main() -> None:
  xla_flags.set_environment(os.environ)
  console = rich.console.Console(highlight=False)
  model = MODELS[FLAGS.model]
  config = engine_flags.engine_config_from_flags()
  workload = Workload(
    num_requests=FLAGS.num_requests,
    prompt_lens=tuple(map(int, FLAGS.prompt_lens)),
    output_lens=tuple(map(int, FLAGS.output_lens)),
  )
  with console.status('Making weights'):
    params = models.init_params(
      model, jax.random.key(0), jnp.dtype(dtype_of(config)), scale=0.06
    )
  llm = llm_lib.LLM(model, params, config=config, eos_token_ids=())
  rows = [
    run(llm, workload, seed)
    for seed in rich.progress.track(
      range(FLAGS.runs + 1), 'Running', console=console, transient=True
    )
  ]
  _report(console, config, llm, rows)


def dtype_of(config: config_lib.EngineConfig) -> str:
  """Returns the dtype of the weights that are made."""
  return 'float32' if config.dtype == config_lib.AUTO else config.dtype


def _shown(value: float | None) -> str:
  if value is None:
    return '-'
  return f'{value:,.0f}' if value > 99 else f'{value:.3g}'


def _report(
  console: rich.console.Console,
  config: config_lib.EngineConfig,
  llm: llm_lib.LLM,
  rows: list[dict[str, float | None]],
) -> None:
  device = jax.devices()[0].device_kind
  table = rich.table.Table(
    '',
    *('warm-up' if i == 0 else f'run {i}' for i in range(len(rows))),
    title=f'{FLAGS.model} {dtype_of(config)} on {device}, {config.policy}, '
    f'{config.token_budget} tokens a step',
  )
  for name in rows[0]:
    table.add_row(name, *(_shown(row[name]) for row in rows))
  console.print(table)
  waste = llm.engine.stats().padding_waste
  console.print(f'{waste:.1%} of the rows computed were padding.')
  common.write_json(
    FLAGS.json,
    'throughput',
    FLAGS,
    rows[1:],
    device=device,
    padding_waste=waste,
  )


if __name__ == '__main__':
  mains.run(main, define_flags, verbosity=logging.WARNING)
