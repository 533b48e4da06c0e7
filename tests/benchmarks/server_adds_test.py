# SPDX-License-Identifier: Apache-2.0
"""The benchmark runs one load in both ways; not how fast."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from sarathi_jax.benchmarks import server_adds
from sarathi_jax.benchmarks import server_front
from sarathi_jax.engine import engine as engine_lib

_OPTIONS = {'qps': 20, 'seconds': 0.2, 'prompt_len': 8, 'output_len': 12}


def make_engine(options: Mapping[str, Any]) -> engine_lib.Engine:
  return server_front.make_engine(16, 0.002)


def test_all_ways_serve_the_same_requests() -> None:
  seen: list[Any] = []
  (found,) = rounds = server_adds.measure(
    _OPTIONS, ['grpc', 'http'], 1, seen.append, make_engine
  )
  assert seen == rounds
  assert set(found) == {'direct', 'grpc', 'http'}
  for how, one in found.items():
    assert one['steps'] >= 12
    assert 0 < one['tbt_p50_ms'] <= one['tbt_p99_ms']
    assert one['cpu_ms'] > 0 and one['engine_ms'] > 0
    if how == 'direct':
      assert one['loop_ms'] == 0
    else:
      assert one['loop_ms'] > 0 and one['client_ms'] > 0


def test_the_ratio_is_that_of_rounds_with_its_interval() -> None:
  rounds = [
    {
      'direct': {'tbt_p50_ms': base, 'loop_ms': 0.0},
      'http': {'tbt_p50_ms': base * ratio, 'loop_ms': 2.0, 'client_ms': 3.0},
    }
    for base, ratio in zip((10, 50, 90), (1.1, 1.0, 1.3), strict=True)
  ]
  tbt, loop, client = rows = server_adds.summary(rounds)
  assert (tbt['direct'], tbt['http']) == (50, 50)
  assert tbt['http_ratio'] == {
    'median': pytest.approx(1.1),  # not that of the medians
    'low': pytest.approx(1.0),
    'high': pytest.approx(1.3),
  }
  assert 'http_ratio' not in loop and loop['http'] == 2
  assert client['direct'] is None and client['http'] == 3
  assert server_adds.table(rows, ['http']).row_count == 3
