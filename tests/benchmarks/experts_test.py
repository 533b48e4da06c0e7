# SPDX-License-Identifier: Apache-2.0
"""Both ways give the same, and the command says what it measured."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from sarathi_jax.benchmarks import experts
from tests import source_tree


def test_it_measures_what_is_the_same() -> None:
  config = experts.model(8, 2, 32, 16)
  for rows in (1, 8):
    row = experts.measure(config, rows, runs=2)
    assert row['largest difference'] < 1e-5
    assert row['arithmetic saved'] == 4
    assert row['times as fast'] == row['all, ms'] / row['chosen, ms']
    part = 1 - row['chosen, ms'] / row['all, ms']
    assert row['time saved, of arithmetic'] == pytest.approx(part / 0.75)


def test_where_no_arithmetic_is_saved_no_part_of_it_is_told() -> None:
  row = experts.measure(experts.model(2, 2, 16, 8), 1, runs=1)
  assert row['time saved, of arithmetic'] is None


def test_the_command_writes_its_results(tmp_path) -> None:
  path = tmp_path / 'experts.json'
  done = subprocess.run(
    [
      sys.executable,
      '-m',
      'sarathi_jax.benchmarks.experts',
      '--num_experts=4',
      '--experts_per_token=1',
      '--hidden_size=16',
      '--intermediate_size=8',
      '--rows=2',
      '--runs=1',
      f'--json={path}',
    ],
    cwd=source_tree.ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  assert '4 experts of 16 x 8, 1 a row' in done.stdout
  (row,) = json.loads(path.read_text())['results']
  assert row['rows'] == 2 and row['arithmetic saved'] == 4
