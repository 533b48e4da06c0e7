# SPDX-License-Identifier: Apache-2.0
"""The report: the paper's numbers beside ours."""

from __future__ import annotations

from collections.abc import Iterator
import json
import pathlib

import pytest

from sarathi_jax.simulator import report
from tests import absl_flags
from tests.simulator import cost_model_test


@pytest.fixture(scope='module', autouse=True)
def _flags() -> Iterator[None]:
  with absl_flags.defined(report.define_flags):
    yield


def run(folder: pathlib.Path, *args: str) -> str:
  absl_flags.parse(
    f'--output={folder}', f'--configs={cost_model_test.CONFIGS}', *args
  )
  report.main()
  return (folder / 'report.md').read_text()


def test_a_table_has_the_ratio_of_ours_to_the_paper() -> None:
  text = report.markdown(
    [
      {'case': 'a', 'paper s': 2.0, 'ours s': 1.0},
      {'case': 'b', 'paper s': None, 'ours s': 1.0},
    ]
  )
  assert text.splitlines() == [
    '| case | paper s | ours s | ours s / paper |',
    '|---|---|---|---|',
    '| a | 2 | 1 | 0.50 |',
    '| b |  | 1 |  |',
  ]


@pytest.mark.slow
def test_table_4_has_the_shape_of_the_paper(tmp_path: pathlib.Path) -> None:
  text = run(tmp_path, '--experiments=figure_13,figure_14,table_4')
  assert '## Table 4' in text
  assert '## What is not modelled' in text
  rows = json.loads((tmp_path / 'table_4.json').read_text())['rows']
  chat = {r['policy']: r for r in rows if r['workload'] == 'openchat_sharegpt4'}
  ttft = {p: r['ours P50 TTFT s'] for p, r in chat.items()}
  tbt = {p: r['ours P99 TBT s'] for p, r in chat.items()}
  assert ttft['hybrid_only'] < ttft['sarathi'] < ttft['chunked_only']
  assert tbt['sarathi'] < tbt['chunked_only'] < tbt['hybrid_only'] / 3


def test_what_was_simulated_is_kept(tmp_path: pathlib.Path) -> None:
  (tmp_path / 'figure_14.json').write_text(
    json.dumps(
      {
        'num_requests': 7,
        'host': 'none',
        'chats': 'drawn',
        'rows': [{'paper': 1.5, 'ours': 3.0}],
      }
    )
  )
  assert '| 1.5 | 3 | 2.00 |' in run(tmp_path, '--experiments=figure_14')
  assert '| 1.5 | 3 | 2.00 |' not in run(
    tmp_path, '--experiments=figure_14', '--again'
  )
