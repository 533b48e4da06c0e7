# SPDX-License-Identifier: Apache-2.0
"""When a probe is lost, and what a scenario is under another policy."""

from __future__ import annotations

import dataclasses
import types
from typing import Any

import numpy as np
import pytest

from sarathi_jax import config as config_lib
from sarathi_jax.engine import metrics as metrics_lib
from sarathi_jax.models import published
from sarathi_jax.simulator import hardware
from sarathi_jax.simulator import hosts
from sarathi_jax.simulator import probe
from sarathi_jax.simulator import scenario as scenario_lib
from sarathi_jax.simulator import search
from sarathi_jax.simulator import workload as workload_lib
from tests.simulator import simulate_test


@pytest.mark.parametrize('gap_s', [0.05, 0.5])
@pytest.mark.parametrize('has_batch', [False, True])
def test_long_gaps_lose_a_probe_if_all_count(
  monkeypatch: pytest.MonkeyPatch, gap_s: float, has_batch: bool
) -> None:
  monkeypatch.setattr(probe, '_LOOK_EVERY', 1)
  workload = dataclasses.replace(
    simulate_test.make_workload((0, 4, 51), (0, 4, 51)),
    is_batch=np.array([False, has_batch]),
  )
  metrics = metrics_lib.EngineMetrics()
  metrics.tbt_s.add([gap_s] * 100)
  engine: Any = types.SimpleNamespace(
    metrics=metrics, stats=lambda: types.SimpleNamespace(num_waiting=0)
  )
  is_lost = probe.lost(search.Slo(p99_tbt_s=0.1), workload)
  assert is_lost(engine, 1.0) == (gap_s > 0.1 and not has_batch)


def _paced() -> scenario_lib.Scenario:
  return scenario_lib.Scenario(
    name='paced',
    model=published.MODELS['mistral-7b'],
    hardware=hardware.load('a100'),
    host=hosts.HOSTS['none'],
    workload=workload_lib.WorkloadConfig(source='openchat_sharegpt4'),
    config=config_lib.EngineConfig(tbt_slo_ms=50, batch_tbt_slo_ms=500),
  )


@pytest.mark.parametrize(
  ('policy', 'token_budget'),
  [('sarathi', 512), ('vllm', None), ('orca', None), ('chunked_only', 512)],
)
def test_other_budgets_follow_no_slo_of_the_file(
  policy: str, token_budget: int | None
) -> None:
  config = _paced().with_policy(policy, token_budget).config
  assert (config.tbt_slo_ms, config.batch_tbt_slo_ms) == (None, None)


def test_the_budget_of_the_file_keeps_its_slo() -> None:
  config = _paced().with_policy('sarathi', None).config
  assert (config.tbt_slo_ms, config.batch_tbt_slo_ms) == (50, 500)
