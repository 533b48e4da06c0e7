# SPDX-License-Identifier: Apache-2.0
"""The script that measures on a GPU, tried where there is none."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

from sarathi_jax.benchmarks.gpu import attention


def run(*args: str) -> subprocess.CompletedProcess[str]:
  return subprocess.run(
    [sys.executable, '-m', 'sarathi_jax.benchmarks.gpu.check', *args],
    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    env=os.environ | {'JAX_PLATFORMS': 'cpu'})


def test_stages_add_up_over_runs(tmp_path: pathlib.Path) -> None:
  flags = '--size=tiny', f'--output={tmp_path}'
  first = run(*flags, '--stages=limits')
  assert first.returncode == 0, first.stdout
  second = run(*flags, '--stages=limits,attention')
  assert second.returncode == 0, second.stdout
  assert 'limits: done before' in second.stdout
  found = json.loads((tmp_path / 'gpu_check.json').read_text())
  assert set(found['results']) == {'limits', 'attention'}
  assert {row['kind'] for row in found['results']['attention']} == {
    'decode', 'prefill', 'hybrid', 'its decodes', 'its chunk'}
  assert all(row['us'] > 0 for row in found['results']['attention'])


@pytest.mark.parametrize(('flag', 'message'), [
  ('--stages=nonsense', '--stages=nonsense: must be of tests, limits'),
  ('--size=full', 'JAX sees no GPU here, but cpu'),
])
def test_what_cannot_be_done_is_said(
    tmp_path: pathlib.Path, flag: str, message: str) -> None:
  done = run(f'--output={tmp_path}', flag)
  assert done.returncode
  assert message in done.stdout.replace('\n', ' ')


def test_counts_of_a_chunk() -> None:
  """Worked by hand: 2 queries after 3 keys see 4 and 5."""
  sweep = attention.Sweep(num_heads=2, num_kv_heads=1, head_dim=16)
  batch = attention.Batch('prefill', 0, 0, 2, 3)
  assert batch.flops(sweep) == 4 * (4 + 5) * 2 * 16
  assert batch.kv_bytes(sweep) == 2 * 5 * 16 * 2
