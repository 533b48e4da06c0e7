# SPDX-License-Identifier: Apache-2.0
"""The live benchmark, with a runner that takes a millisecond a step."""

from __future__ import annotations

import dataclasses
import pathlib
import time
from typing import Any

import pytest

from sarathi_jax import config as config_lib
from sarathi_jax import scheduler as scheduler_lib
from sarathi_jax import types
from sarathi_jax.benchmarks import live_capacity
from sarathi_jax.engine import engine as engine_lib
from sarathi_jax.engine import fake_runner
from sarathi_jax.scheduler import pacing
from sarathi_jax.simulator import search
from sarathi_jax.simulator import workload


class SteadyRunner(fake_runner.FakeRunner):
  """Takes a millisecond a step."""

  def launch(self, batch: types.ScheduledBatch) -> Any:
    time.sleep(1e-3)
    return super().launch(batch)


class Setup(live_capacity.Setup):
  """Without a model."""

  def engine(self, **changes: Any) -> engine_lib.Engine:
    config = dataclasses.replace(self.config, **changes)
    scheduler = scheduler_lib.make(config, max_model_len=32, num_pages=64)
    return engine_lib.Engine(
      scheduler,
      pacing.paced(
        SteadyRunner(100, config.max_num_seqs), scheduler, time.monotonic
      ),
      info=engine_lib.EngineInfo.of(
        scheduler.config, policy=config.policy, vocab_size=100
      ),
    )


@pytest.fixture
def setup(tmp_path: pathlib.Path) -> Setup:
  trace = tmp_path / 'trace.csv'
  trace.write_text('num_prefill_tokens,num_decode_tokens\n6,4\n12,8\n')
  return Setup(
    model=None,
    params=None,
    config=config_lib.EngineConfig(
      token_budget=8, max_num_seqs=4, page_size=8, look_ahead=False
    ),
    workload=workload.WorkloadConfig(source=str(trace), num_requests=60),
  )


def test_live_and_simulated_are_compared(setup: Setup) -> None:
  found = live_capacity.compare(setup, load=0.3, seconds=0.6)
  assert found['num_requests'] >= 0.6 * found['qps']
  assert [row['quantity'] for row in found['rows']] == [
    'P50 ttft_s',
    'P99 ttft_s',
    'P50 tbt_s',
    'P99 tbt_s',
  ]
  for row in found['rows']:
    assert row['live'] >= 1e-3
    for told in ('before', 'own'):
      assert row[told] >= 1e-3 * 0.9
      assert row[f'{told} / live'] == row[told] / row['live']


def test_policies_are_compared_live(setup: Setup) -> None:
  rows = live_capacity.capacities(
    setup,
    ['vllm', 'sarathi 16'],
    search.Slo(p99_tbt_s=5, p50_delay_s=0.01),
    start=50.0,
    precision=1.0,
    seconds=0.2,
  )
  assert [row['row'] for row in rows] == ['vllm', 'sarathi 16']
  assert rows[0]['over_first'] == 1
  for row in rows:  # A step each token, four at once at most.
    assert 0 < row['capacity_qps'] < 4 * 1000 / 4
