# SPDX-License-Identifier: Apache-2.0
"""Compares the live engine with the simulator, and policies with each other.

  python -m sarathi_jax.benchmarks.live_capacity --model=22m --json=c.json

First the simulator is checked: step times are fitted to a live run. Then other
requests are served live, and the same ones are simulated with those step times,
and with those of the run itself, which other users of the machine do not spoil.
Then the capacity of each policy and budget is searched live, at one SLO.
Weights are random, arrivals Poisson, lengths those of the paper's chat, scaled
to the model. Two cores take ten minutes.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import gc
import math
import os
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
from sarathi_jax import scheduler as scheduler_lib
from sarathi_jax.benchmarks import common
from sarathi_jax.benchmarks import throughput
from sarathi_jax.cli import flags as engine_flags
from sarathi_jax.cli import mains
from sarathi_jax.engine import engine as engine_lib
from sarathi_jax.simulator import lengths as lengths_lib
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
  flags.DEFINE_enum(
    'model',
    '22m',
    list(throughput.MODELS),
    'Shape of the model, whose weights are random.',
  )
  flags.DEFINE_enum(
    'dtype', 'float32', ['float32', 'bfloat16'], 'Dtype of the weights.'
  )
  flags.DEFINE_float(
    'length_scale', 0.1, 'Factor that the lengths of chats are multiplied by.'
  )
  engine_flags.define_fields(token_budget=128, max_num_seqs=32)
  flags.DEFINE_float(
    'load',
    0.7,
    'Rate at which live and simulated are '
    'compared, as a fraction of the simulated capacity.',
  )
  flags.DEFINE_float(
    'seconds',
    180.0,
    'Seconds for which live and simulated '
    'are compared; a third as long is learnt from before.',
  )
  flags.DEFINE_list(
    'rows',
    ['vllm', 'sarathi'],
    'Policies whose capacity is '
    'searched, maybe with a budget ("sarathi 256"); auto is '
    'sarathi that follows the SLO. Empty: no search.',
  )
  flags.DEFINE_float(
    'slo_tbt_p99',
    None,
    'SLO: the most that the P99 time '
    'between tokens may be, seconds. Default: five times what '
    'a step of decodes takes, as in the paper.',
  )
  flags.DEFINE_float(
    'slo_delay_p50',
    0.5,
    'SLO: the most that the median '
    'scheduling delay may be, seconds; a fourth of the '
    "paper's, as runs are short.",
  )
  flags.DEFINE_float(
    'probe_seconds',
    20.0,
    'Seconds for which requests come at each rate of a search.',
  )
  flags.DEFINE_float('precision', 0.15, 'Relative precision of capacities.')
  flags.DEFINE_string('json', None, 'File to write the results to, as JSON.')


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
  """What is run: a model of random weights and a workload."""

  model: Any
  params: Any
  config: config_lib.EngineConfig
  workload: workload_lib.WorkloadConfig
  progress: rich.progress.Progress = dataclasses.field(
    default_factory=lambda: rich.progress.Progress(disable=True)
  )

  def engine(self, **changes: Any) -> engine_lib.Engine:
    """Makes an engine, warm, with `changes` to its configuration."""
    gc.collect()  # A cache fills the device: that of the one before must go.
    return llm_lib.LLM(
      self.model,
      self.params,
      eos_token_ids=(),
      config=dataclasses.replace(self.config, **changes),
    ).engine

  def requests(
    self, seed: int, qps: float = 1.0, num_requests: int | None = None
  ) -> workload_lib.Workload:
    """Makes requests to come."""
    return workload_lib.make(
      dataclasses.replace(
        self.workload,
        seed=seed,
        num_requests=num_requests or self.workload.num_requests,
      )
    ).at_rate(qps)

  def serve(
    self,
    engine: engine_lib.Engine,
    workload: workload_lib.Workload,
    what: str,
    slo: search.Slo | None = None,
  ) -> simulate.Result:
    """Serves requests live; ends early if `slo` is given and lost."""
    is_lost = probe_lib.lost(slo, workload) if slo else None
    task = self.progress.add_task(
      f'{what}, {workload.qps:.3g} QPS', total=len(workload)
    )

    def watch(engine: engine_lib.Engine, now: float) -> bool:
      self.progress.update(task, completed=engine.metrics.num_finished)
      return is_lost is not None and is_lost(engine, now)

    try:
      return simulate.drive(
        engine, workload, wait_until=common.sleep_until, stop_when=watch
      )
    finally:
      self.progress.remove_task(task)


def max_model_len(workload: workload_lib.WorkloadConfig) -> int:
  """Returns the most tokens of a dataset's sequence, scaled."""
  cap = lengths_lib.DATASETS[workload.source].cap
  return math.ceil(cap * workload.length_scale) + 2  # Both are rounded.


def simulated(
  setup: Setup, engine: engine_lib.Engine, workload: workload_lib.Workload
) -> simulate.Result:
  """Simulates requests with the steps that an engine measured."""
  assert engine.pace is not None
  info = engine.info
  scheduler = scheduler_lib.make(
    setup.config, max_model_len=info.max_model_len, num_pages=info.num_pages
  )
  return simulate.simulate_steps(
    scheduler, runner_lib.FittedCost(engine.pace.model), workload, info=info
  )


def compare(setup: Setup, load: float, seconds: float) -> dict[str, Any]:
  """Serves one workload live and simulated.

  Args:
    setup: what is run.
    load: the rate, as a fraction of the simulated capacity.
    seconds: how long requests come.

  Returns:
    The rate, the number of requests, and rows of quantiles in seconds: live,
    simulated by the steps learnt before, and by the run's own.
  """
  engine = setup.engine(tbt_slo_ms=_NO_SLO_MS)
  assert engine.pace is not None

  def rate() -> float:
    """Returns the rate for the load, by what was learnt of steps so far."""

    def probe(rates: Sequence[float]) -> list[search.Point]:
      slo = search.Slo(p99_tbt_s=_NO_SLO_MS)
      return [
        probe_lib.point(
          simulated(setup, engine, setup.requests(0, qps)), slo, qps
        )
        for qps in rates
      ]

    return search.find(probe, 1.0).qps * load

  qps = rate()
  engine.pace.model.recent.clear()  # Warming up differs from serving.
  setup.serve(
    engine, setup.requests(1, qps, math.ceil(qps * seconds / 3)), 'Learning'
  )
  qps = rate()
  workload = setup.requests(2, qps, math.ceil(qps * seconds))
  before = simulated(setup, engine, workload).metrics
  engine.pace.model.recent.clear()
  live = setup.serve(engine, workload, 'Comparing').metrics
  after = simulated(setup, engine, workload).metrics
  rows: list[dict[str, Any]] = []
  for name in ('ttft_s', 'tbt_s'):
    for q in _QUANTILES:
      seen, *told = (
        getattr(m, name).quantile(q) for m in (live, before, after)
      )
      rows.append(
        {
          'quantity': f'P{q * 100:g} {name}',
          'live': seen,
          'before': told[0],
          'before / live': told[0] / seen,
          'own': told[1],
          'own / live': told[1] / seen,
        }
      )
  return {'qps': qps, 'num_requests': len(workload), 'rows': rows}


def search_row(
  setup: Setup,
  name: str,
  slo: search.Slo,
  start: float,
  precision: float = 0.1,
  seconds: float | None = None,
) -> dict[str, Any]:
  """Searches the capacity of one policy live.

  Args:
    setup: what is run.
    name: a policy, and maybe a budget; 'auto' is sarathi that follows the SLO.
    slo: what must hold.
    start: the rate to begin with.
    precision: relative precision of the capacity.
    seconds: how long requests come at each rate; None for as many requests as
      the workload has.
  """
  policy, _, budget = name.partition(' ')
  changes: dict[str, Any] = {'policy': policy} | (
    {'token_budget': int(budget)} if budget else {}
  )
  if name == 'auto':
    changes = {'policy': 'sarathi', 'tbt_slo_ms': slo.p99_tbt_s * 1e3}
  engine = setup.engine(**changes)

  def probe(rates: Sequence[float]) -> list[search.Point]:
    points = []
    for qps in rates:
      workload = setup.requests(
        3, qps, None if seconds is None else math.ceil(qps * seconds)
      )
      points.append(
        probe_lib.point(
          setup.serve(engine, workload, f'Capacity of {name}', slo), slo, qps
        )
      )
    return points

  found = search.find(probe, start, precision=precision)
  best = found.best
  return {
    'slo_tbt_p99_s': slo.p99_tbt_s,
    'capacity_qps': found.qps,
    'p99_tbt_s': best and best.p99_tbt_s,
    'p50_ttft_s': best and best.p50_ttft_s,
  }


def capacities(
  setup: Setup,
  names: Sequence[str],
  slo: search.Slo,
  start: float,
  precision: float,
  seconds: float,
) -> list[dict[str, Any]]:
  """Runs `search_row` for each; tells how much the first one is exceeded."""
  results: list[dict[str, Any]] = []
  for name in names:
    row = search_row(setup, name, slo, start, precision, seconds)
    start = row['capacity_qps'] or start
    first = results[0]['capacity_qps'] if results else row['capacity_qps']
    results.append(
      {'row': name, **row, 'over_first': row['capacity_qps'] / (first or 1e-9)}
    )
  return results


def strict_slo_s(setup: Setup) -> float:
  """Returns five times what a step of 32 decodes takes, as in the paper."""
  pace = setup.engine(tbt_slo_ms=_NO_SLO_MS).pace
  assert pace is not None
  context = 32 * int(setup.requests(0).prompt_lens.mean())
  return 5 * pace.model.predict((32, 32, context, 0))


def main() -> None:
  console = rich.console.Console(highlight=False)
  model = throughput.MODELS[FLAGS.model]
  workload = workload_lib.WorkloadConfig(
    num_requests=500, length_scale=FLAGS.length_scale
  )
  setup = Setup(
    model=model,
    workload=workload,
    config=config_lib.EngineConfig(
      token_budget=FLAGS.token_budget,
      max_num_seqs=FLAGS.max_num_seqs,
      max_model_len=max_model_len(workload),
      prefix_cache=False,  # One engine is given each load several times.
      compilation_cache_dir=os.path.join(
        config_lib.default_cache_dir(), 'live_capacity'
      ),
    ),
    progress=rich.progress.Progress(
      console=console, transient=True, refresh_per_second=1
    ),
    params=models.init_params(
      model, jax.random.key(0), jnp.dtype(FLAGS.dtype), scale=0.06
    ),
  )
  with setup.progress:
    compared = compare(setup, FLAGS.load, FLAGS.seconds)
    console.print(
      common.table(
        compared['rows'],
        f'{compared["num_requests"]} requests at '
        f'{compared["qps"]:.3g} QPS: live, and simulated by the steps of a '
        'run before, or its own',
      )
    )
    found = FLAGS.rows and capacities(
      setup,
      FLAGS.rows,
      search.Slo(
        p99_tbt_s=FLAGS.slo_tbt_p99 or strict_slo_s(setup),
        p50_delay_s=FLAGS.slo_delay_p50,
      ),
      start=compared['qps'],
      precision=FLAGS.precision,
      seconds=FLAGS.probe_seconds,
    )
  if found:
    console.print(common.table(found, 'Live capacity'))
  common.write_json(
    FLAGS.json,
    'live_capacity',
    FLAGS,
    {'compared': compared, 'capacity': found},
    device=jax.devices()[0].device_kind,
  )


if __name__ == '__main__':
  mains.run(main, define_flags, verbosity=logging.WARNING)
