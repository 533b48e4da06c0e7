# SPDX-License-Identifier: Apache-2.0
"""Measures what the prefix cache saves, on a model of random weights.

  python -m sarathi_jax.benchmarks.prefix_cache --load=multi_turn --runs=5

Two engines take turns: one that finds pages, and one that does all the same but
finds none (`prefix_cache_misses`). Their tokens are compared. A load is made of
waves, whose requests come at once; of each run the first wave is cold for both,
and is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
import os
import random
import statistics
import time
from typing import Any

from absl import flags
from absl import logging
import jax
import jax.numpy as jnp
import rich.console
import rich.progress

from sarathi_jax import config as config_lib
from sarathi_jax import llm as llm_lib
from sarathi_jax import models
from sarathi_jax import types
from sarathi_jax import xla_flags
from sarathi_jax.benchmarks import common
from sarathi_jax.benchmarks import throughput
from sarathi_jax.cli import flags as engine_flags
from sarathi_jax.cli import mains

FLAGS = flags.FLAGS
Prompt = list[int]
# load -> what its waves are, for --help.
LOADS = {
  'multi_turn': 'chats, each turn after all before it and their answers',
  'shared_prefix': 'prompts that begin with the same instructions',
  'rl_groups': 'each prompt several times, sampled',
}


def define_flags() -> None:
  flags.DEFINE_enum(
    'load',
    'multi_turn',
    list(LOADS),
    'Load: ' + '; '.join(f'{k}: {v}' for k, v in LOADS.items()) + '.',
  )
  flags.DEFINE_enum(
    'model', '43m', list(throughput.MODELS), 'Shape of the model.'
  )
  flags.DEFINE_integer('num_requests', 8, 'Requests of each wave.')
  flags.DEFINE_integer('waves', 4, 'Waves of each run.')
  flags.DEFINE_integer('prefix_len', 900, 'Tokens of a beginning.')
  flags.DEFINE_integer('new_len', 32, 'Tokens of a prompt that are its own.')
  flags.DEFINE_integer('output_len', 32, 'Tokens of each output.')
  flags.DEFINE_integer('runs', 5, 'Number of runs to measure.')
  flags.DEFINE_string('json', None, 'File to write the results to, as JSON.')
  engine_flags.define_engine_flags()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Load:
  """What comes; see the flags."""

  name: str
  num_requests: int
  waves: int
  prefix_len: int
  new_len: int
  output_len: int


def run(llm: llm_lib.LLM, load: Load, seed: int) -> dict[str, Any]:
  """Runs all waves of a load, fresh for every seed; returns its numbers."""
  rng = random.Random(seed)
  sampling = types.SamplingParams(
    temperature=1.0 if load.name == 'rl_groups' else 0.0,
    seed=seed if load.name == 'rl_groups' else None,
    ignore_eos=True,
    max_tokens=load.output_len,
  )
  prompts = _first_wave(load, rng, llm.model.vocab_size)
  llm.generate(prompts, sampling)
  before = llm.engine.stats()
  ttfts: list[float] = []
  tokens: list[list[tuple[int, ...]]] = []
  start = time.perf_counter()
  answers: list[tuple[int, ...]] = [()] * len(prompts)
  for wave in range(1, load.waves):
    prompts = _next_wave(load, rng, llm.model.vocab_size, prompts, answers)
    done = llm.generate(
      prompts,
      sampling
      if sampling.seed is None
      else dataclasses.replace(sampling, seed=seed + 1000 * wave),
    )
    answers = [d.token_ids for d in done]
    tokens.append(answers)
    ttfts += [d.metrics.ttft_s for d in done if d.metrics.ttft_s is not None]
  seconds = time.perf_counter() - start
  after = llm.engine.stats()
  return {
    'ttft_p50_s': statistics.median(ttfts),
    'output_tokens_per_s': sum(len(t) for wave in tokens for t in wave)
    / seconds,
    'found': (after.num_found - before.num_found)
    / (after.num_looked_up - before.num_looked_up),
    'tokens': tokens,
  }


def _draw(rng: random.Random, num: int, vocab_size: int) -> Prompt:
  return [rng.randrange(vocab_size) for _ in range(num)]


def _first_wave(
  load: Load, rng: random.Random, vocab_size: int
) -> list[Prompt]:
  if load.name == 'multi_turn':
    return [
      _draw(rng, load.prefix_len, vocab_size) for _ in range(load.num_requests)
    ]
  return [_draw(rng, load.prefix_len, vocab_size)] * load.num_requests


def _next_wave(
  load: Load,
  rng: random.Random,
  vocab_size: int,
  before: list[Prompt],
  answers: list[tuple[int, ...]],
) -> list[Prompt]:
  if load.name == 'multi_turn':
    return [
      [*prompt, *answer, *_draw(rng, load.new_len, vocab_size)]
      for prompt, answer in zip(before, answers, strict=True)
    ]
  if load.name == 'shared_prefix':
    return [
      prompt[: load.prefix_len] + _draw(rng, load.new_len, vocab_size)
      for prompt in before
    ]
  return [_draw(rng, load.prefix_len, vocab_size)] * load.num_requests


def _measure(
  llms: dict[str, llm_lib.LLM], load: Load, runs: int
) -> Iterator[dict[str, Any]]:
  """Yields each run's numbers, of both engines; the first one warms up."""
  for seed in range(runs + 1):
    of = {name: run(llm, load, seed) for name, llm in llms.items()}
    same = of['hot'].pop('tokens') == of['cold'].pop('tokens')
    if seed:
      yield {'same_tokens': same, **of}


def main() -> None:
  xla_flags.set_environment(os.environ)
  console = rich.console.Console(highlight=False)
  model = throughput.MODELS[FLAGS.model]
  config = engine_flags.engine_config_from_flags()
  load = Load(
    name=FLAGS.load,
    num_requests=FLAGS.num_requests,
    waves=FLAGS.waves,
    prefix_len=FLAGS.prefix_len,
    new_len=FLAGS.new_len,
    output_len=FLAGS.output_len,
  )
  config_lib.check(load.waves > 1, 'waves', load.waves, 'must be at least 2')
  with console.status('Making weights'):
    params = models.init_params(
      model,
      jax.random.key(0),
      jnp.dtype(throughput.dtype_of(config)),
      scale=0.06,
    )
  llms = {
    name: llm_lib.LLM(
      model,
      params,
      config=dataclasses.replace(config, prefix_cache_misses=misses),
      eos_token_ids=(),
    )
    for name, misses in (('hot', False), ('cold', True))
  }
  rows = list(
    rich.progress.track(
      _measure(llms, load, FLAGS.runs),
      'Running',
      total=FLAGS.runs,
      console=console,
      transient=True,
    )
  )
  _report(console, load, rows)


def _report(
  console: rich.console.Console, load: Load, rows: list[dict[str, Any]]
) -> None:
  device = jax.devices()[0].device_kind
  medians = {
    name: {
      what: statistics.median(row[name][what] for row in rows)
      for what in ('ttft_p50_s', 'output_tokens_per_s', 'found')
    }
    for name in ('hot', 'cold')
  }
  console.print(
    common.table(
      [
        {
          '': name,
          'found': f'{of["found"]:.0%}',
          'TTFT P50, ms': f'{of["ttft_p50_s"] * 1e3:,.0f}',
          'tokens/s': f'{of["output_tokens_per_s"]:,.0f}',
        }
        for name, of in medians.items()
      ],
      title=f'{FLAGS.model}, {load.name}, on {device}: medians of '
      f'{len(rows)} runs',
    )
  )
  gains = [r['cold']['ttft_p50_s'] / r['hot']['ttft_p50_s'] for r in rows]
  console.print(
    f'The first token comes {statistics.median(gains):.1f} times as soon '
    f'({min(gains):.1f} to {max(gains):.1f}); the same tokens in '
    f'{sum(r["same_tokens"] for r in rows)} of {len(rows)} runs.'
  )
  common.write_json(FLAGS.json, 'prefix_cache', FLAGS, rows, device=device)


if __name__ == '__main__':
  mains.run(main, define_flags, verbosity=logging.WARNING)
