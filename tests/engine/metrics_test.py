# SPDX-License-Identifier: Apache-2.0
"""Quantiles in bounded memory, against NumPy's of all values."""

from __future__ import annotations

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest

from sarathi_jax.engine import metrics

# A rank between two values may be either: each side is within 1 %.
values = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=200)
ranks = st.floats(0, 1)


@hypothesis.given(values=values, q=ranks)
@hypothesis.settings(max_examples=300)
def test_a_quantile_is_within_one_percent(
  values: list[float], q: float
) -> None:
  quantiles = metrics.Quantiles()
  quantiles.add(values)
  found = quantiles.quantile(q)
  assert found is not None
  lower, higher = np.quantile(
    values, [max(q - 1e-9, 0), min(q + 1e-9, 1)], method='lower'
  )
  assert lower * 0.99 <= found <= higher * 1.01


@hypothesis.given(values=values)
@hypothesis.settings(max_examples=50)
def test_batches_add_up(values: list[float]) -> None:
  whole, parts = metrics.Quantiles(), metrics.Quantiles()
  whole.add(values)
  for value in values:
    parts.add([value])
  assert whole.count == parts.count == len(values)
  assert whole.largest == parts.largest == max(values)
  assert whole.mean == pytest.approx(np.mean(values))
  assert whole.quantile(0.5) == parts.quantile(0.5)


def test_the_largest_is_never_exceeded() -> None:
  quantiles = metrics.Quantiles()
  quantiles.add([0.0, 1.0])
  assert quantiles.quantile(0) == pytest.approx(0, abs=1e-8)
  assert quantiles.quantile(1) == pytest.approx(1, rel=0.01)
  quantiles.add([1.0001] * 3)
  largest = quantiles.quantile(1)
  assert largest is not None
  assert largest <= 1.0001


def test_without_values_there_is_none() -> None:
  quantiles = metrics.Quantiles()
  quantiles.add([])
  assert quantiles.mean is None
  assert quantiles.quantile(0.5) is None


def test_memory_is_bounded() -> None:
  quantiles = metrics.Quantiles()
  quantiles.add(np.geomspace(1e-6, 1e3, 100_000).tolist())
  assert len(quantiles._counts) < 1100
  p99 = quantiles.quantile(0.99)
  assert p99 == pytest.approx(10 ** (-6 + 9 * 0.99), rel=0.01)


def test_padding_waste() -> None:
  totals = metrics.EngineMetrics()
  assert totals.padding_waste == 0.0
  totals.record_step(6, 8, 8)
  totals.record_step(8, 8, 8)
  assert totals.padding_waste == 2 / 16
