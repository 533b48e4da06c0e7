# SPDX-License-Identifier: Apache-2.0
"""The engine live, against the simulator, and policies against each other.

  python -m sarathi_jax.benchmarks.live_capacity --model=43m --json=c.json

First the simulator is held to account: step times are fitted to a live run,
then one workload is served live, and simulated with those step times. Then
the capacity of each policy and budget is searched live, at one SLO. Weights
are random, lengths those of the paper's chat, scaled to the model.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import gc
import math
import os
import time
from typing import Any

from absl import app
from absl import flags
from absl import logging
import jax
import jax.numpy as jnp
import rich.console
import rich.table

from sarathi_jax import config as config_lib
from sarathi_jax import llm as llm_lib
from sarathi_jax import models
from sarathi_jax import scheduler as scheduler_lib
from sarathi_jax.benchmarks import common
from sarathi_jax.benchmarks import throughput
from sarathi_jax.engine import engine as engine_lib
from sarathi_jax.simulator import probe as probe_lib
from sarathi_jax.simulator import runner as runner_lib
from sarathi_jax.simulator import search
from sarathi_jax.simulator import simulate
from sarathi_jax.simulator import workload as workload_lib

FLAGS = flags.FLAGS
# Bounds no step, but has the engine measure them.
_NO_SLO_MS = 1e9
_QUANTILES = (0.5, 0.99)


def define_flags() -> None:
  flags.DEFINE_enum('model', '43m', list(throughput.MODELS), 'Its shape.')
  flags.DEFINE_enum('dtype', 'float32', ['float32', 'bfloat16'], 'Of weights.')
  flags.DEFINE_float('length_scale', 0.1, 'What the lengths of chats are '
                     'multiplied by.')
  flags.DEFINE_integer('token_budget', 128, 'The most tokens of a step.')
  flags.DEFINE_integer('max_num_seqs', 32, 'Sequences running at once.')
  flags.DEFINE_integer('num_requests', 100, 'Of each run.')
  flags.DEFINE_float('load', 0.7, 'Of the simulated capacity: the rate at '
                     'which live and simulated are compared.')
  flags.DEFINE_float('slo_tbt_p99', None, 'Seconds; else five times what a '
                     'step of decodes takes, as in the paper.')
  flags.DEFINE_list('rows', ['sarathi', 'vllm'], 'Policies whose capacity is '
                    'searched; auto is sarathi that follows the SLO.')
  flags.DEFINE_string('json', None, 'File for the results.')


def sleep_until(time_s: float) -> None:
  """Waits on the clock of engines."""
  time.sleep(max(0.0, time_s - time.monotonic()))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
  """What is run: a model of random weights and a workload."""

  model: Any
  params: Any
  config: config_lib.EngineConfig
  workload: workload_lib.WorkloadConfig

  def engine(self, **changes: Any) -> engine_lib.Engine:
    """An engine, warm; `changes` are of its configuration."""
    return llm_lib.LLM(
      self.model, self.params,
      config=dataclasses.replace(self.config, **changes)).engine

  def make_workload(self, seed: int) -> workload_lib.Workload:
    """Requests, at one a second."""
    return workload_lib.make(dataclasses.replace(self.workload, seed=seed))


def max_model_len(workload: workload_lib.WorkloadConfig) -> int:
  """What a sequence of a dataset may have, scaled."""
  cap = workload_lib.DATASETS[workload.source].cap
  return math.ceil(cap * workload.length_scale) + 2  # Both are rounded.


def simulated(setup: Setup, engine: engine_lib.Engine,
              workload: workload_lib.Workload) -> simulate.Result:
  """What the simulator makes of the steps that an engine measured."""
  assert engine.pace is not None
  info, config = engine.info, setup.config
  scheduler = scheduler_lib.policy_class(config.policy)(
    config_lib.SchedulerConfig(
      token_budget=config.token_budget, max_num_seqs=config.max_num_seqs,
      max_model_len=info.max_model_len, num_pages=info.num_pages,
      page_size=info.page_size, look_ahead=config.look_ahead,
      short_prompt_share=config.short_prompt_share))
  return simulate.simulate_steps(
    scheduler, runner_lib.FittedCost(engine.pace.model), workload,
    info=info)


def compare(setup: Setup, load: float) -> list[dict[str, Any]]:
  """Serves one workload live and simulated.

  Returns:
    The quantiles of both, in seconds, and how far the simulated ones are off.
  """
  engine = setup.engine(tbt_slo_ms=_NO_SLO_MS)
  assert engine.pace is not None
  learn, test = (setup.make_workload(seed) for seed in (1, 2))

  def probe(rates: Sequence[float]) -> list[search.Point]:
    slo = search.Slo(p99_tbt_s=1e6)
    return [probe_lib.point(simulated(setup, engine, learn.at_rate(q)), slo, q)
            for q in rates]

  # What warming up has taught is enough to know the rate at which to learn.
  rate = search.find(probe, 1.0).qps * load
  engine.pace.model.ratios.clear()  # those of warming up are of its beginning
  simulate.drive(engine, learn.at_rate(rate), wait_until=sleep_until)
  rate = search.find(probe, rate).qps * load
  test = test.at_rate(rate)
  expected = simulated(setup, engine, test).metrics
  seen = simulate.drive(engine, test, wait_until=sleep_until).metrics
  rows: list[dict[str, Any]] = []
  for name in ('ttft_s', 'tbt_s'):
    for q in _QUANTILES:
      was, should = (getattr(m, name).quantile(q) for m in (seen, expected))
      rows.append({'quantity': f'P{q * 100:g} {name}', 'live': was,
                   'simulated': should, 'error': should / was - 1,
                   'qps': rate})
  return rows


def search_row(setup: Setup, name: str, slo_tbt_s: float, start: float,
               precision: float = 0.1) -> dict[str, Any]:
  """The capacity of one policy, searched live.

  Args:
    setup: what is run.
    name: a policy, and maybe a budget; 'auto' is sarathi that follows the SLO.
    slo_tbt_s: the most that the P99 time between tokens may be.
    start: the rate to begin with.
    precision: relative.
  """
  gc.collect()  # An engine's cache fills the device: one at a time.
  policy, _, budget = name.partition(' ')
  changes: dict[str, Any] = {'policy': policy} | (
    {'token_budget': int(budget)} if budget else {})
  if name == 'auto':
    changes = {'policy': 'sarathi', 'tbt_slo_ms': slo_tbt_s * 1e3}
  engine = setup.engine(**changes)
  workload = setup.make_workload(3)
  slo = search.Slo(p99_tbt_s=slo_tbt_s)

  def probe(rates: Sequence[float]) -> list[search.Point]:
    return [probe_lib.point(simulate.drive(
      engine, workload.at_rate(q), wait_until=sleep_until,
      stop_when=probe_lib.lost(slo, workload.at_rate(q))), slo, q)
      for q in rates]

  found = search.find(probe, start, precision=precision)
  best = found.best
  return {'slo_tbt_p99_s': slo_tbt_s, 'capacity_qps': found.qps,
          'p99_tbt_s': best and best.p99_tbt_s,
          'p50_ttft_s': best and best.p50_ttft_s}


def capacities(setup: Setup, names: Sequence[str], slo_tbt_s: float,
               start: float) -> list[dict[str, Any]]:
  """`search_row` of each, and how much the first one is exceeded."""
  results: list[dict[str, Any]] = []
  for name in names:
    row = search_row(setup, name, slo_tbt_s, start)
    start = row['capacity_qps'] or start
    first = results[0]['capacity_qps'] if results else row['capacity_qps']
    results.append({'row': name, **row,
                    'over_first': row['capacity_qps'] / (first or 1e-9)})
  return results


def strict_slo_s(setup: Setup) -> float:
  """Five times what a step of 32 decodes takes, as in the paper."""
  gc.collect()
  pace = setup.engine(tbt_slo_ms=_NO_SLO_MS).pace
  assert pace is not None
  context = 32 * int(setup.make_workload(0).prompt_lens.mean())
  return 5 * pace.model.predict((32, 32, context, 0))


def _show(console: rich.console.Console, title: str,
          rows: Sequence[dict[str, Any]]) -> None:
  table = rich.table.Table(*rows[0], title=title)
  for row in rows:
    table.add_row(*(f'{v:.4g}' if isinstance(v, float) else str(v)
                    for v in row.values()))
  console.print(table)


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unexpected argument: {argv[1]}')
  if not FLAGS['verbosity'].present:
    logging.set_verbosity(logging.WARNING)  # JAX says a lot
  console = rich.console.Console(highlight=False)
  model = throughput.MODELS[FLAGS.model]
  workload = workload_lib.WorkloadConfig(
    num_requests=FLAGS.num_requests, length_scale=FLAGS.length_scale)
  setup = Setup(
    model=model, workload=workload, config=config_lib.EngineConfig(
      token_budget=FLAGS.token_budget, max_num_seqs=FLAGS.max_num_seqs,
      max_model_len=max_model_len(workload),
      compilation_cache_dir=os.path.join(
        config_lib.default_cache_dir(), 'live_capacity')),
    params=jax.jit(lambda: models.init_params(
      model, jax.random.key(0), jnp.dtype(FLAGS.dtype), scale=0.06))())
  compared = compare(setup, FLAGS.load)
  _show(console, 'The same requests, live and simulated', compared)
  found = capacities(
    setup, FLAGS.rows, FLAGS.slo_tbt_p99 or strict_slo_s(setup),
    start=compared[0]['qps'])
  _show(console, 'Live capacity', found)
  common.write_json(
    FLAGS.json, 'live_capacity', FLAGS,
    {'compared': compared, 'capacity': found},
    device=jax.devices()[0].device_kind)


if __name__ == '__main__':
  define_flags()
  app.run(main)
