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


def test_both_ways_serve_the_same_requests() -> None:
  seen: list[Any] = []
  (pair,) = pairs = server_adds.measure(_OPTIONS, 1, seen.append, make_engine)
  assert seen == pairs
  for how in ('direct', 'served'):
    one = pair[how]
    assert one['steps'] >= 12
    assert 0 < one['tbt_p50_ms'] <= one['tbt_p99_ms']
    assert one['cpu_ms'] > 0 and one['engine_ms'] > 0
  assert pair['direct']['loop_ms'] == 0
  assert pair['served']['loop_ms'] > 0 and pair['served']['client_ms'] > 0


def test_the_ratio_is_that_of_pairs_with_its_interval() -> None:
  pairs = [
    {
      'direct': {'tbt_p50_ms': base, 'loop_ms': 0.0},
      'served': {'tbt_p50_ms': base * ratio, 'loop_ms': 2.0, 'client_ms': 3.0},
    }
    for base, ratio in zip((10, 50, 90), (1.1, 1.0, 1.3), strict=True)
  ]
  tbt, loop, client = server_adds.summary(pairs)
  assert (tbt['direct'], tbt['served']) == (50, 50)
  assert tbt['ratio'] == pytest.approx(1.1)  # not that of the medians
  assert tbt['low'] == pytest.approx(1.0) and tbt['high'] == (
    pytest.approx(1.3)
  )
  assert 'ratio' not in loop and loop['served'] == 2
  assert client['direct'] is None and client['served'] == 3
