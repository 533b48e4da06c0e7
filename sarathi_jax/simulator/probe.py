# SPDX-License-Identifier: Apache-2.0
"""Tries one rate on a simulated deployment; picklable, for other processes."""

from __future__ import annotations

from collections.abc import Callable
import math

from sarathi_jax import errors
from sarathi_jax.engine import engine as engine_lib
from sarathi_jax.simulator import scenario as scenario_lib
from sarathi_jax.simulator import search
from sarathi_jax.simulator import simulate
from sarathi_jax.simulator import workload as workload_lib

# Steps between two looks at whether a probe is lost already.
_LOOK_EVERY = 256


def run(
  scenario: scenario_lib.Scenario, slo: search.Slo, qps: float
) -> search.Point:
  """Simulates a scenario at a rate; ends early if the SLO is lost."""
  workload = workload_lib.make(scenario.workload).at_rate(qps)
  result = simulate.simulate(
    scenario.cost(), scenario.config, workload, stop_when=lost(slo, workload)
  )
  return point(result, slo, qps)


def point(result: simulate.Result, slo: search.Slo, qps: float) -> search.Point:
  """Returns what a run says about a rate."""
  return search.Point(
    qps=qps,
    p99_tbt_s=result.p99_tbt_s,
    p50_ttft_s=result.p50_ttft_s,
    p50_scheduling_delay_s=result.p50_scheduling_delay_s,
    found=result.found,
    holds=(
      result.is_complete
      and result.p99_tbt_s <= slo.p99_tbt_s
      and result.p50_scheduling_delay_s <= slo.p50_delay_s
    ),
  )


def lost(
  slo: search.Slo,
  workload: workload_lib.Workload,
) -> Callable[[engine_lib.Engine, float], bool]:
  """Returns what says whether the SLO is lost, whatever may still come."""
  num_gaps = int((workload.output_lens - 1).sum())
  # The engine does not tell gaps of the tier batch from those that count.
  all_count = not workload.is_batch.any()
  # Turns of chats come later than it says, and never half of all at once.
  has_turns = workload.chats is not None and bool(
    (workload.chats.after >= 0).any()
  )
  num_steps = 0

  def is_lost(engine: engine_lib.Engine, now: float) -> bool:
    nonlocal num_steps
    num_steps += 1
    if num_steps % _LOOK_EVERY:
      return False
    if all_count and slo.is_lost(engine.metrics.tbt_s, num_gaps):
      return True
    if has_turns:
      return False
    # More than half of all requests wait, and have done so for too long.
    waiting = engine.stats().num_waiting
    oldest = workload.arrived_at[
      min(
        engine.metrics.scheduling_delay_s.count + waiting // 2,
        len(workload) - 1,
      )
    ]
    return waiting > len(workload) / 2 + 1 and (
      now - float(oldest) > slo.p50_delay_s
    )

  return is_lost


def fastest_tbt_s(scenario: scenario_lib.Scenario) -> float:
  """Predicts the least time between tokens: one sequence, alone, of a token."""
  cost = scenario.cost()
  return sum(cost.stage_seconds(1, 1, 1, 1, 0.0))


def check(scenario: scenario_lib.Scenario, slo: search.Slo) -> None:
  """Raises ConfigError if no rate can meet the SLO, or it does not fit."""
  fastest = fastest_tbt_s(scenario)
  if slo.p99_tbt_s < fastest:
    raise errors.ConfigError(
      f'slo_tbt_p99={slo.p99_tbt_s:g}: no rate can meet it; the fastest '
      f'possible time between tokens of {scenario.name} is {fastest:.4g} s, '
      'of one sequence alone.'
    )
  longest = workload_lib.make(scenario.workload)
  simulate.make_scheduler(
    scenario.cost(),
    scenario.config,
    scenario.config.max_model_len
    or int((longest.prompt_lens + longest.output_lens).max()),
  )


def start_qps(scenario: scenario_lib.Scenario) -> float:
  """Estimates what full steps could serve, where a search may begin."""
  workload = workload_lib.make(scenario.workload)
  tokens = float((workload.prompt_lens + workload.output_lens).mean())
  n = min(scenario.config.token_budget, 2048)
  seconds = max(scenario.cost().stage_seconds(n, 1, 64, 64 * 2048, 0.0))
  return 0.5 * n / seconds / tokens if math.isfinite(seconds) else 1.0
