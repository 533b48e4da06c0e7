# SPDX-License-Identifier: Apache-2.0
"""Plots say what they show, and none is blank."""

from __future__ import annotations

from collections.abc import Sequence
import pathlib
from typing import Any

import pytest

from sarathi_jax.simulator import capacity
from sarathi_jax.simulator import plots
from sarathi_jax.simulator import search

POINTS = tuple(
  search.Point(
    qps=float(qps),
    p99_tbt_s=0.02 * qps,
    p50_ttft_s=0.1 * qps,
    p50_scheduling_delay_s=0.0,
    holds=qps < 3,
  )
  for qps in (1, 2, 3)
)
NONE = search.Capacity(
  best=None,
  points=(
    search.Point(
      qps=1.0,
      p99_tbt_s=0.0,
      p50_ttft_s=0.0,
      p50_scheduling_delay_s=9.0,
      holds=False,
    ),
  ),
)
SOME = search.Capacity(best=POINTS[1], points=POINTS)


def rows(*policies: str, scenario: Any = None) -> list[capacity.Row]:
  return [
    capacity.Row(
      scenario=scenario,
      config='a_config',
      workload='a_workload',
      policy=policy,
      token_budget=None,
      slo=search.Slo(p99_tbt_s=0.1),
    )
    for policy in policies
  ]


def saved(
  folder: pathlib.Path,
  rows: Sequence[capacity.Row],
  found: Sequence[search.Capacity],
) -> dict[str, str]:
  """SVGs, whose text is kept as comments, by name."""
  plots.save_all(folder, rows, found)
  assert {f.stem for f in folder.glob('*.png')} == {
    f.stem for f in folder.glob('*.svg')
  }
  return {f.stem: f.read_text() for f in folder.glob('*.svg')}


def test_a_plot_says_what_was_done_and_what_its_lines_are(
  tmp_path: pathlib.Path,
) -> None:
  found = saved(tmp_path, rows('sarathi', 'vllm'), [SOME, SOME])
  assert found.keys() == {'capacity', 'tbt', 'ttft'}
  for text in found.values():
    for word in ('a_config', 'a_workload', 'measured', 'policy', 'sarathi'):
      assert word in text
  for simulated in (
    plots.capacity_bars,
    lambda *args: plots.against_qps(*args, 'p99_tbt_s', 'P99 TBT, s'),
  ):
    axes = simulated(rows('vllm', scenario=object()), [SOME]).axes[0]
    assert 'simulated' in axes.get_title()
    assert axes.get_legend().get_title().get_text() == 'policy'


def test_what_has_nothing_to_show_is_not_drawn(tmp_path: pathlib.Path) -> None:
  found = saved(tmp_path, rows('sarathi', 'vllm'), [SOME, NONE])
  assert 'sarathi' in found['tbt'] and 'vllm' not in found['tbt']
  assert 'vllm' in found['capacity']  # It is 0.00, which is drawn.
  found = saved(tmp_path, rows('sarathi', 'vllm'), [NONE, NONE])
  assert found.keys() == {'capacity'}  # And those of before are gone.


@pytest.mark.parametrize('field', ['p99_tbt_s', 'p50_ttft_s'])
def test_a_rate_at_which_nothing_was_seen_is_left_out(field: str) -> None:
  axes = plots.against_qps(
    rows('vllm'),
    [search.Capacity(best=None, points=(*NONE.points, *POINTS))],
    field,
    '',
  ).axes[0]
  assert list(axes.lines[0].get_xdata()) == [1.0, 2.0, 3.0]
