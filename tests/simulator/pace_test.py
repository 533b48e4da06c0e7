# SPDX-License-Identifier: Apache-2.0
"""The budget that follows the SLO, beside fixed ones, on simulated GPUs."""

from __future__ import annotations

import pytest

from sarathi_jax.simulator import experiments
from sarathi_jax.simulator import paper
from sarathi_jax.simulator import probe
from sarathi_jax.simulator import search
from sarathi_jax.simulator import simulate
from sarathi_jax.simulator import workload as workload_lib
from tests.simulator import cost_model_test

SETTINGS = experiments.Settings(
  configs=cost_model_test.CONFIGS,
  num_requests=192,
  jobs=1,
  precision=0.02,
  host='paper',
)


@pytest.mark.parametrize(
  ('name', 'slo_s', 'fixed', 'qps'),
  [
    (paper.MISTRAL, 0.1, 512, 2.3),
    (paper.LLAMA, 1.0, 512, 0.85),
    pytest.param(paper.MISTRAL, 0.5, 2048, 2.5, marks=pytest.mark.slow),
    pytest.param(paper.YI, 0.2, 512, 1.0, marks=pytest.mark.slow),
    pytest.param(paper.YI, 1.0, 2048, 1.25, marks=pytest.mark.slow),
    pytest.param(paper.LLAMA, 5.0, 1536, 0.85, marks=pytest.mark.slow),
    pytest.param(paper.FALCON, 1.0, 512, 0.75, marks=pytest.mark.slow),
    pytest.param(paper.FALCON, 5.0, 2048, 0.75, marks=pytest.mark.slow),
  ],
)
def test_it_holds_slos_where_the_best_fixed_budget_does(
  name: str, slo_s: float, fixed: int, qps: float
) -> None:
  """At a rate near what the fixed budget can serve, strict and relaxed."""
  base, slo = SETTINGS.scenario(name, paper.CHAT), search.Slo(p99_tbt_s=slo_s)
  for budget in (fixed, 'auto'):
    scenario = base.with_policy('sarathi', budget, slo_s)
    assert probe.run(scenario, slo, qps).holds, budget


@pytest.mark.parametrize(
  'name',
  [
    paper.MISTRAL,
    paper.LLAMA,
    pytest.param(paper.YI, marks=pytest.mark.slow),
    pytest.param(paper.FALCON, marks=pytest.mark.slow),
  ],
)
def test_at_saturation_it_is_as_fast_as_the_best_fixed_budget(
  name: str,
) -> None:
  base = SETTINGS.scenario(name, paper.CHAT, 160)
  workload = workload_lib.make(base.workload).at_rate(10.0)
  seconds = {}
  for budget in (384, 512, 1024, 'auto'):
    scenario = base.with_policy('sarathi', budget, paper.SLOS[name][0][0])
    seconds[budget] = simulate.simulate(
      scenario.cost(), scenario.config, workload
    ).seconds
  assert min(seconds.values()) >= 0.95 * seconds['auto']
