# SPDX-License-Identifier: Apache-2.0
"""Searches of a service whose capacity is known."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from sarathi_jax import errors
from sarathi_jax.simulator import search


class Service:
  """Holds up to a rate."""

  def __init__(self, capacity: float) -> None:
    self.capacity = capacity
    self.tried: list[float] = []

  def __call__(self, rates: Sequence[float]) -> list[search.Point]:
    self.tried += rates
    return [
      search.Point(
        qps=q,
        p99_tbt_s=q,
        p50_ttft_s=1.0,
        p50_scheduling_delay_s=0.0,
        holds=q <= self.capacity,
      )
      for q in rates
    ]


@pytest.mark.parametrize('width', [1, 2, 5])
@pytest.mark.parametrize('capacity', [0.013, 0.9, 1.0, 7.7, 300])
def test_a_capacity_is_found_from_anywhere(width: int, capacity: float) -> None:
  service = Service(capacity)
  found = search.find(service, 1.0, width=width, precision=0.02)
  assert capacity / 1.02 <= found.qps <= capacity
  assert found.best is not None
  assert found.best.holds
  assert [p.qps for p in found.points] == sorted(service.tried)
  assert len(service.tried) <= 25 * width


def test_what_never_holds_has_no_capacity() -> None:
  found = search.find(Service(0), 1.0)
  assert found.best is None
  assert found.qps == 0
  assert len(found.points) < 20


def test_what_always_holds_ends() -> None:
  assert search.find(Service(1e9), 1.0).qps >= 1e4


def test_a_rate_that_fails_bounds_those_above() -> None:
  """Noise: a rate that holds above one that does not counts for nothing."""

  def probe(rates: Sequence[float]) -> list[search.Point]:
    return [
      search.Point(
        qps=q,
        p99_tbt_s=q,
        p50_ttft_s=1.0,
        p50_scheduling_delay_s=0.0,
        holds=q < 1 or 3 < q < 5,
      )
      for q in rates
    ]

  assert search.find(probe, 1.0, width=3).qps < 1


@pytest.mark.parametrize(
  'fields',
  [
    {'p99_tbt_s': 0},
    {'p99_tbt_s': float('nan')},
    {'p99_tbt_s': 1, 'p50_delay_s': -1},
  ],
)
def test_bad_objectives(fields: dict) -> None:
  with pytest.raises(errors.ConfigError, match='must be seconds > 0'):
    search.Slo(**fields)
  with pytest.raises(errors.ConfigError, match='start_qps'):
    search.find(Service(1), 0)
