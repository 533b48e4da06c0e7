# SPDX-License-Identifier: Apache-2.0
"""The benchmark runs, and counts the work right."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

from pallas_kernels.ragged_paged_attention import arg_spec
from pallas_kernels.ragged_paged_attention import bench


def test_counts_work():
  spec = arg_spec.ArgSpec(
    name='by_hand',
    contexts=(5, 4),
    num_decodes=1,
    q_lens=(3,),
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
  )
  # The decode sees 5 tokens, the chunk's three queries 2, 3 and 4.
  assert bench.work(spec) == ((5 + 4) * 2 * 8 * 4, 4 * 14 * 2 * 8)


def test_counts_work_within_a_window():
  spec = arg_spec.ArgSpec(
    name='by_hand',
    contexts=(9, 5, 9),
    num_decodes=1,
    q_lens=(5, 3),
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    sliding_window=4,
  )
  # The decode sees 4 tokens. The chunk that is a whole prompt sees no more
  # than it has; the other one, of 3 queries with 4 tokens each, 6.
  assert bench.work(spec) == (
    (4 + 5 + 6) * 2 * 8 * 4,
    4 * (4 + (1 + 2 + 3 + 4 + 4) + 3 * 4) * 2 * 8,
  )


def _bench(*args: str) -> subprocess.CompletedProcess[str]:
  return subprocess.run(
    [
      sys.executable,
      '-m',
      'pallas_kernels.ragged_paged_attention.bench',
      *args,
    ],
    capture_output=True,
    text=True,
    check=False,
    cwd=pathlib.Path(__file__).parents[3],
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
  )


def test_prints_a_table_and_writes_json(tmp_path: pathlib.Path):
  output = tmp_path / 'rows.json'
  done = _bench(
    '--specs=page_1,tokens_below_seqs',
    '--layers=1',
    '--repeats=2',
    f'--output={output}',
  )
  assert done.returncode == 0, done.stderr
  header, *rows = done.stdout.splitlines()
  assert header.split()[:3] == ['spec', 'implementation', 'ms']
  assert [row.split()[0] for row in rows] == ['page_1', 'tokens_below_seqs']
  written = json.loads(output.read_text())
  assert written['layers'] == 1
  assert [row['spec'] for row in written['rows']] == [
    'page_1',
    'tokens_below_seqs',
  ]
  assert all(row['ms'] > 0 for row in written['rows'])


def test_names_unknown_specs():
  done = _bench('--specs=nope')
  assert done.returncode != 0
  assert '--specs=nope: not among' in done.stdout + done.stderr
