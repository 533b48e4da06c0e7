# SPDX-License-Identifier: Apache-2.0
"""Mosaic's kernels, compiled for GPUs that are not here."""

from __future__ import annotations

from collections.abc import Callable
import itertools
import json
import pathlib
import subprocess
import sys
from typing import Any

import jax
import pytest

from pallas_kernels import gpu_targets
from pallas_kernels.add_and_norm import configurations as norm_cases
from pallas_kernels.aot import cases
from pallas_kernels.aot import kernels
from pallas_kernels.filter_threshold import configurations as filter_cases
from pallas_kernels.ragged_paged_attention import configurations
from pallas_kernels.rotate_and_write import configurations as rotate_cases
from tests import source_tree
from tests.pallas_kernels.aot import bounds_test
from tests.pallas_kernels.aot import matmul

_COMMAND = """
from pallas_kernels.aot import main
import importlib
import sys
op = sys.argv.pop(1)
configurations = importlib.import_module(f'pallas_kernels.{op}.configurations')
part = slice(int(sys.argv.pop(1)), None, int(sys.argv.pop(1)))
main.CASES = lambda device: list(configurations.mosaic_cases())[part],
main.run()
"""


def needs_mosaic(test: Callable[..., None]) -> Any:
  """Marks a test of the lane with the compiler of the newest JAX."""
  return matmul.needs_wheels(
    pytest.mark.skipif(jax.__version_info__ < (0, 11), reason='needs JAX 0.11')(
      test
    )
  )


def test_what_mosaic_dumps_is_read(tmp_path: pathlib.Path) -> None:
  (tmp_path / 'attend_0.ptxas').write_text("""\
ptxas info    : Compiling entry function 'attend_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for attend_mosaic_gpu_kernel
    8 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers
""")
  (tmp_path / 'attend_0.ptx').write_text('.visible .entry x()\n.reqntid 384\n')
  for number in (1, 2):  # Lowered for two layers, compiled for both.
    (tmp_path / f'attend_{number}.resources.txt').write_text(
      'Resources(smem_scratch_bytes=198656, tmem_scratch_cols=0)'
    )
  (found,) = kernels.read_mosaic(tmp_path, gpu_targets.get('h100'))
  assert found == kernels.Kernel(
    'attend',
    True,
    threads=384,
    registers=168,
    spill_bytes=12,
    shared_memory=198656,
    blocks_per_sm=1,
  )


def _compile(
  path: pathlib.Path, op: str, device: str, part: int, parts: int
) -> Any:
  """What the command finds, alone: Mosaic keeps what a process compiled."""
  done = subprocess.run(
    [
      sys.executable,
      '-c',
      _COMMAND,
      op,
      str(part),
      str(parts),
      f'--device={device}',
      f'--json={path}',
    ],
    cwd=source_tree.ROOT,
    check=False,
  )
  found: list[dict[str, Any]] = json.loads(path.read_text())['cases']
  assert not {
    case['name']: case['problems'] for case in found if case['problems']
  }
  assert done.returncode == 0
  return found


def _in_parts(parts: int, *devices: str) -> Any:
  """Parametrizes a test by device and part; a push has one of some devices.

  A process compiles one after the other. A40's and A100's kernels are one.
  """
  return pytest.mark.parametrize(
    ('device', 'part'),
    [
      pytest.param(
        device,
        part,
        marks=[pytest.mark.slow]
        if part != number or device not in devices
        else [],
      )
      for number, device in enumerate(gpu_targets.TARGETS)
      for part in range(parts)
    ],
  )


@needs_mosaic
@_in_parts(8, 'a40', 'h100')  # What fits A40's memory fits A100's.
def test_every_configuration_compiles(
  device: str, part: int, tmp_path: pathlib.Path
) -> None:
  found = _compile(
    tmp_path / 'aot.json', 'ragged_paged_attention', device, part, 8
  )
  assert len(found) > 1
  ours = [
    {kernel['name'] for kernel in case['kernels'] if kernel['is_ours']}
    for case in found
  ]
  # What merges may be what another case has, and is then not compiled again.
  assert all(names >= {'attend_chunks', 'attend_small'} for names in ours)
  assert 'merge_splits' in set().union(*ours)


@needs_mosaic
@_in_parts(7, 'a100', 'h100')
def test_every_product_of_experts_compiles(
  device: str, part: int, tmp_path: pathlib.Path
) -> None:
  found = _compile(tmp_path / 'aot.json', 'grouped_matmul', device, part, 7)
  assert len(found) > 1
  for case in found:
    assert 'grouped_matmul' in {kernel['name'] for kernel in case['kernels']}


@matmul.needs_disassembler
@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason='needs JAX 0.12')
def test_loops_on_ampere() -> None:
  bounds_test.check(bounds_test.Bounds('a100', 'bfloat16 Mosaic', 0.28, 3.9))


@needs_mosaic
@pytest.mark.parametrize('device', list(gpu_targets.TARGETS))
def test_tritons_compile_on_this_jax_too(device: str) -> None:
  """Each kernel once; the other lane has them all, on the oldest JAX."""
  first = itertools.islice(configurations.cases(device), 1)
  last = itertools.islice(filter_cases.cases(device), 2, 3)
  turned = itertools.islice(rotate_cases.cases(device), 1)
  normed = itertools.islice(norm_cases.cases(device), 1)
  results = cases.check(itertools.chain(first, turned, normed, last), device)
  assert not {r.name: r.problems for r in results if r.problems}
  assert {k.name for r in results for k in r.kernels if k.is_ours} == {
    'attend_chunks',
    'attend_small',
    'merge_splits',
    'rotate_and_write',
    'add_and_norm',
    'least_kept',
  }


@needs_mosaic
@pytest.mark.slow
@pytest.mark.parametrize('device', ['h100', 'a100'])
def test_mistrals_step_compiles_in_place(
  device: str, tmp_path: pathlib.Path
) -> None:
  path = tmp_path / 'plan.json'
  subprocess.run(
    [
      sys.executable,
      '-m',
      'sarathi_jax.plan',
      f'--json={path}',
      f'--config=configs/mistral_7b_{device}.py',
      '--attention=pallas_mosaic',
    ],
    cwd=source_tree.ROOT,
    check=True,
  )
  case = json.loads(path.read_text())['step']
  assert 'attend_chunks' in {kernel['name'] for kernel in case['kernels']}
  assert (case['graphs'], case['outside_graphs']) == (1, [])
