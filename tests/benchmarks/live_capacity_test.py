# SPDX-License-Identifier: Apache-2.0
"""The live benchmark, on a model so small that it takes seconds."""

from __future__ import annotations

import pathlib

import pytest

from sarathi_jax.benchmarks import live_capacity
from sarathi_jax.simulator import search
from sarathi_jax.simulator import workload
from tests import tiny


@pytest.fixture
def setup(tmp_path: pathlib.Path) -> live_capacity.Setup:
  trace = tmp_path / 'trace.csv'
  trace.write_text('num_prefill_tokens,num_decode_tokens\n6,4\n12,8\n')
  return live_capacity.Setup(
    model=tiny.MODEL, params=tiny.make_params(),
    config=tiny.engine_config(max_model_len=32),
    workload=workload.WorkloadConfig(source=str(trace), num_requests=30))


def test_live_and_simulated_are_compared(setup: live_capacity.Setup) -> None:
  found = live_capacity.compare(setup, load=0.2, seconds=1.0)
  assert found['num_requests'] >= found['qps']
  assert [row['quantity'] for row in found['rows']] == [
    'P50 ttft_s', 'P99 ttft_s', 'P50 tbt_s', 'P99 tbt_s']
  for row in found['rows']:
    assert 0 < row['live'] < 10
    for told in ('before', 'own'):
      assert row[f'{told} / live'] == row[told] / row['live'] > 0


def test_policies_are_compared_live(setup: live_capacity.Setup) -> None:
  rows = live_capacity.capacities(
    setup, ['vllm', 'sarathi 8'], search.Slo(p99_tbt_s=5, p50_delay_s=0.01),
    start=50.0, precision=1.0, seconds=0.5)
  assert [row['row'] for row in rows] == ['vllm', 'sarathi 8']
  assert rows[0]['over_first'] == 1
  assert all(row['capacity_qps'] > 0 for row in rows)
