# SPDX-License-Identifier: Apache-2.0
"""Mosaic's kernel, compiled for an H100 that is not here."""

from __future__ import annotations

from collections.abc import Callable
import json
import pathlib
import subprocess
import sys
from typing import Any

import jax
import pytest

from pallas_kernels import gpu_targets
from pallas_kernels.aot import cases
from pallas_kernels.aot import kernels
from pallas_kernels.ragged_paged_attention import tuning
from tests import source_tree
from tests.pallas_kernels.aot import matmul


def needs_mosaic(test: Callable[..., None]) -> Any:
  """Marks a test of the lane with the compiler of the newest JAX."""
  return matmul.needs_wheels(pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason='needs JAX 0.11')(test))


def test_what_mosaic_dumps_is_read(tmp_path: pathlib.Path) -> None:
  (tmp_path / 'attend_0.ptxas').write_text('''\
ptxas info    : Compiling entry function 'attend_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for attend_mosaic_gpu_kernel
    8 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers
''')
  (tmp_path / 'attend_0.ptx').write_text('.visible .entry x()\n.reqntid 384\n')
  (tmp_path / 'attend_0.resources.txt').write_text(
    'Resources(smem_scratch_bytes=198656, tmem_scratch_cols=0)')
  found, = kernels.read_mosaic(tmp_path, gpu_targets.get('h100'))
  assert found == kernels.Kernel(
    'attend', True, threads=384, registers=168, spill_bytes=12,
    shared_memory=198656, blocks_per_sm=1)


@needs_mosaic
def test_every_configuration_compiles() -> None:
  results = cases.check(tuning.mosaic_cases(), 'h100')
  assert len(results) > 10
  assert not {r.name: r.problems for r in results if r.problems}
  for result in results:
    names = [kernel.name for kernel in result.kernels if kernel.is_ours]
    assert names == [
      'ragged_paged_attention', 'merge_splits', 'attend_chunks']


@needs_mosaic
@pytest.mark.slow
def test_mistrals_step_compiles_in_place(tmp_path: pathlib.Path) -> None:
  file = tmp_path / 'aot.json'
  subprocess.run(
    [sys.executable, '-m', 'pallas_kernels.aot', '--device=h100',
     '--model=configs/mistral_7b_h100.py', '--attention=pallas_mosaic',
     f'--json={file}'], cwd=source_tree.ROOT, check=True)
  case, = json.loads(file.read_text())['cases']
  assert not case['problems']
  assert 'attend_chunks' in {kernel['name'] for kernel in case['kernels']}
  assert (case['graphs'], case['outside_graphs']) == (1, [])
