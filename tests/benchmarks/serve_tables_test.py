# SPDX-License-Identifier: Apache-2.0
"""Rows, capacities and tables of benchmarks.serve."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest

from sarathi_jax import errors
from sarathi_jax.benchmarks import serve_capacity
from sarathi_jax.benchmarks import serve_tables
from sarathi_jax.engine import metrics
from sarathi_jax.simulator import open_loop

ROOT = pathlib.Path(__file__).parents[2]

SLO = serve_capacity.Slo(name='2 steps', tbt_s=0.1, ttft_s=1.0)


def seen(*outcomes: open_loop.Outcome) -> open_loop.Seen:
  found = open_loop.Seen(list(outcomes), seconds=2.0)
  found.tbt_s.add([0.1])
  return found


def test_the_row_of_a_run() -> None:
  def outcome(ttft_s: float, gap_s: float) -> open_loop.Outcome:
    return open_loop.Outcome(
      token_ids=[1, 2, 3],
      num_messages=2,
      ttft_s=ttft_s,
      longest_gap_s=gap_s,
      e2e_s=3.0,
    )

  row = serve_capacity.make_row(
    seen(
      outcome(0.1, 0.1),
      outcome(0.1, 0.5),
      outcome(2.0, 0.1),
      open_loop.Outcome(error='UNAVAILABLE'),
    ),
    [SLO],
  )
  assert row['goodput_per_s'] == {'2 steps': 0.5}
  assert row['requests_per_s'] == 1.5
  assert row['output_tokens_per_s'] == 4.5
  assert row['tokens_per_message'] == 1.5
  assert (row['num_errors'], row['errors']) == (1, ['UNAVAILABLE'])
  assert row['ttft_p50_s'] == pytest.approx(0.1, rel=0.02)
  assert not SLO.holds(row)  # one failed
  assert SLO.holds(row | {'num_errors': 0})


def points(side: str, **ttft_s: float) -> list[serve_capacity.Row]:
  return [
    {
      'side': side,
      'qps': float(q[1:]),
      'ttft_p50_s': t,
      'tbt_p99_s': 0.05,
      'num_errors': 0,
    }
    for q, t in ttft_s.items()
  ]


def test_capacities_are_the_largest_rates_that_hold() -> None:
  merged = [
    *points('ours', q1=0.1, q2=0.9, q4=3),
    *points('theirs', q1=2.0),
    *points('fast', q1=0.1, q8=0.2),
    {'side': 'ours', 'qps': 8.0, 'skipped': 'overloaded at 4'},
  ]
  (row,) = serve_capacity.capacities(
    merged,
    [SLO],
    {
      '2 steps': {
        'a': ['ours', 'theirs'],
        'b': ['theirs'],
        'c': ['fast'],
        'd': [],
      }
    },
  )
  assert {
    g: (f['side'], f['qps'], f['is_open']) for g, f in row['best'].items()
  } == {
    'a': ('ours', 2, False),
    'b': ('theirs', 0, False),
    'c': ('fast', 8, True),
  }


@pytest.mark.parametrize(
  ('held', 'expected'),
  [
    ({1: True, 4: False}, 2),
    ({1: True, 2: False, 4: True}, 6),
    ({1: False, 2: False}, 0.5),
    ({4: True}, 6),
    ({2: True, 2.1: False}, None),
    ({1: True, 3: False, 8: False}, 1.73),
  ],
)
def test_the_next_rate(held: dict[float, bool], expected: float) -> None:
  assert serve_capacity.next_rate(held) == expected


def test_rounds_are_merged_by_medians() -> None:
  def row(tbt_s: float | None, errors: int = 0) -> serve_capacity.Row:
    return {
      'side': 'a',
      'qps': 1.0,
      'round': 0,
      'num_errors': errors,
      'errors': [],
      'goodput_per_s': {'x': 1.0},
      'ttft_p50_s': 0.1,
      'tbt_p99_s': tbt_s,
    }

  (merged,) = serve_capacity.merge([row(0.1), row(0.5, 1), row(0.2)])
  assert merged['tbt_p99_s'] == 0.2 and merged['rounds'] == 3
  assert merged['num_errors'] == 1  # None is forgotten.
  assert merged['range'] == {'ttft_p50_s': [0.1, 0.1], 'tbt_p99_s': [0.1, 0.5]}
  assert serve_capacity.merge([row(None)])[0]['tbt_p99_s'] is None


def result(ours: float, theirs: float) -> dict[str, Any]:
  def best(side: str, qps: float) -> serve_capacity.Row:
    return {'side': side, 'qps': qps, 'tried': [0.5, 8], 'is_open': qps == 8}

  return {
    'machine': {'cores': 2},
    'engines': {'vLLM': '1.2'},
    'flags': {'vllm_token_budgets': ['128', '512']},
    'results': {
      'runs': [
        {
          'side': side,
          'qps': 2.0,
          'round': number,
          'num_errors': 0,
          'goodput_per_s': {},
          'ttft_p50_s': ttft_s,
          'tbt_p99_s': 0.04,
        }
        for side, ttft_s in (('ours 512', 0.1), ('vLLM 128', 0.2))
        for number in range(2)
      ],
      'capacity': [
        {
          'name': '2 steps',
          'tbt_s': 0.026,
          'ttft_s': 1.0,
          'best': {
            serve_tables.PACED: best('x', ours),
            'vLLM': best('y', theirs),
          },
        }
      ],
    },
  }


@pytest.mark.parametrize(
  ('ours', 'theirs', 'cells'),
  [
    (3, 2, '3 | 2 | 1.50'),
    (2, 3, '2 | 3 | 0.67'),
    (2, 0, '2 | none at 0.5 or more | -'),
    (8, 4, '≥ 8 | 4 | 2.00'),
    (2, 8, '2 | ≥ 8 | -'),
  ],
)
def test_the_readme_s_table(ours: float, theirs: float, cells: str) -> None:
  table = serve_tables.readme({'43m': result(ours, theirs)})
  assert table.splitlines()[0].count('|') == table.splitlines()[2].count('|')
  assert table.splitlines()[2] == (
    f'| 43m Llama, P99 TBT ≤ 26 ms (2 steps) | {cells} |'
  )
  assert 'vLLM 1.2, best of budgets 128, 512' in table
  assert table.splitlines()[-3:] == [
    '| 43m: P50 TTFT, P99 TBT, ms, at requests of | ours 512 | vLLM 128 |',
    '|---|---|---|',
    '| 2 a second | 100, 40 | 200, 40 |',
  ]


def test_the_readme_is_what_the_results_say() -> None:
  text = (ROOT / 'README.md').read_text()
  assert (
    serve_tables.insert(text, serve_tables.readme(serve_tables.read())) == text
  )
  with pytest.raises(errors.ConfigError, match='no <!--'):
    serve_tables.insert('nothing', '')


def test_a_plot_says_what_was_measured(tmp_path: pathlib.Path) -> None:
  path = tmp_path / 'plot.svg'
  times = {'TTFT': seen(open_loop.Outcome()).tbt_s, 'TBT': metrics.Quantiles()}
  serve_tables.plot(str(path), 'ours 512, 2 QPS', times)
  text = path.read_text()  # SVG keeps texts as comments.
  for words in ('ours 512, 2 QPS, measured', 'seconds', 'TTFT'):
    assert words in text
  assert 'TBT' not in text  # There are none.


def test_a_plot_of_nothing_is_not_drawn(tmp_path: pathlib.Path) -> None:
  path = tmp_path / 'plot.svg'
  with pytest.raises(errors.ConfigError, match='2 QPS: nothing was answered'):
    serve_tables.plot(str(path), '2 QPS', {'TTFT': metrics.Quantiles()})
  assert not path.exists()


@pytest.mark.parametrize('name', ['none/plot.svg', 'plot.txt'])
def test_a_plot_that_cant_be_written(tmp_path: pathlib.Path, name: str) -> None:
  with pytest.raises(errors.ConfigError, match=r"plot=.*can't be written"):
    serve_tables.plot(str(tmp_path / name), 'x', {'TTFT': seen().tbt_s})
