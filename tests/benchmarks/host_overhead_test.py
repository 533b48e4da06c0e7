# SPDX-License-Identifier: Apache-2.0
"""The benchmark runs and says under which circumstances; not how fast."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

from tests import source_tree
from tests import tokenizer_fixture


def test_parts_add_up(tmp_path: pathlib.Path) -> None:
  file = tmp_path / 'results.json'
  done = subprocess.run(
    [
      sys.executable,
      '-m',
      'sarathi_jax.benchmarks.host_overhead',
      '--running=4',
      '--waiting=0,20',
      '--steps=100',
      f'--json={file}',
      f'--tokenizer={tokenizer_fixture.write(tmp_path)}',
    ],
    cwd=source_tree.ROOT,
    capture_output=True,
    text=True,
    check=True,
  )
  assert 'Host work, ms a step' in done.stdout
  found = json.loads(file.read_text())
  assert found['benchmark'] == 'host_overhead'
  assert {'python', 'cores'} <= found['machine'].keys()
  assert found['flags']['steps'] == 100
  assert [(r['running'], r['waiting']) for r in found['results']] == [
    (4, 0),
    (4, 20),
  ]
  for row in found['results']:
    parts = [row[k] for k in ('schedule', 'build', 'complete', 'outputs')]
    assert all(part > 0 for part in parts)
    assert abs(sum(parts) - row['total']) < 1e-6
