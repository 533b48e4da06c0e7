# SPDX-License-Identifier: Apache-2.0
"""Kernels compiled for GPUs that are not here: what must be refused is.

They need the wheels of the extra `aot`; scripts/test brings them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys
from typing import Any, TypeVar
import zlib

import jax.numpy as jnp
import pytest

from pallas_kernels import gpu_targets
from pallas_kernels.add_and_norm import configurations as norm_cases
from pallas_kernels.aot import cases
from pallas_kernels.aot import compiler
from pallas_kernels.filter_threshold import configurations as filter_cases
from pallas_kernels.grouped_matmul import configurations as grouped_cases
from pallas_kernels.ragged_paged_attention import configurations
from pallas_kernels.ragged_paged_attention import layout
from pallas_kernels.rotate_and_write import configurations as rotate_cases
from tests import source_tree
from tests.pallas_kernels.aot import matmul

_Case = TypeVar('_Case', bound=cases.Case)
DEVICES = list(gpu_targets.TARGETS)
_SHALLOW = """
import dataclasses, runpy
_whole = runpy.run_path('configs/mistral_7b_h100.py')
get_config = _whole['get_config']
def get_model():
  return dataclasses.replace(_whole['get_model'](), num_layers=2)
"""
_COMMAND = """
from pallas_kernels.aot import main
from tests.pallas_kernels.aot import matmul
import sys
names = sys.argv.pop(1).split(',')
main.CASES = lambda device: (getattr(matmul, name) for name in names),
main.run()
"""


@matmul.needs_wheels
def test_a_good_kernel_passes() -> None:
  (result,) = cases.check([matmul.GOOD], 'a40')
  assert not result.problems
  (kernel,) = result.kernels
  assert (kernel.name, kernel.is_ours, kernel.threads) == ('good', True, 128)
  assert 32 < kernel.registers < 255
  assert kernel.spill_bytes == 0
  assert kernel.shared_memory >= 2 * 64 * 64 * 2  # a block of each operand
  assert kernel.blocks_per_sm >= 2


@matmul.needs_wheels
def test_a_kernel_is_measured_each_time() -> None:
  """XLA keeps what it compiled before: ptxas must not be left out."""
  again = dataclasses.replace(matmul.GOOD)
  first, second = cases.check([matmul.GOOD, again], 'a100')
  assert first.kernels == second.kernels
  assert not first.problems and not second.problems


@matmul.needs_wheels
def test_spills_are_refused() -> None:
  (result,) = cases.check([matmul.SPILLS], 'a40')
  assert len(result.problems) == 1
  assert 'spills: spills ' in result.problems[0]
  assert result.kernels[0].registers == 255


@matmul.needs_wheels
def test_what_ptxas_calls_slow_is_told() -> None:
  (result,) = cases.check([matmul.SPILLS], 'h100')
  assert any('wgmma' in warning for warning in result.warnings)


@matmul.needs_wheels
def test_shared_memory_is_that_of_the_device() -> None:
  (result,) = cases.check([matmul.TOO_MUCH_SHARED], 'a40')
  assert 'Shared memory size limit exceeded' in result.problems[0]
  assert '101376' in result.problems[0]
  (result,) = cases.check([matmul.TOO_MUCH_SHARED], 'a100')
  assert not result.problems
  assert result.kernels[0].shared_memory > 101376


@matmul.needs_wheels
def test_a_case_without_a_kernel_is_refused() -> None:
  case = configurations.Case(
    'jnp', functools.partial(jnp.add, 1), matmul.GOOD.args[:1]
  )
  (result,) = cases.check([case], 'a40')
  assert result.problems == ['there is no Pallas kernel in it']


@matmul.needs_wheels
@pytest.mark.parametrize(
  ('names', 'status', 'words'),
  [
    # mosaic_test.py has commands that end well, on the newest JAX.
    pytest.param('GOOD', 0, '1 of 1 compile for a40', marks=pytest.mark.slow),
    ('GOOD,SPILLS,TOO_MUCH_SHARED', 1, 'spills: spills: spills '),
  ],
)
def test_command(
  names: str, status: int, words: str, tmp_path: pathlib.Path
) -> None:
  file = tmp_path / 'aot.json'
  done = subprocess.run(
    [sys.executable, '-c', _COMMAND, names, '--device=a40', f'--json={file}'],
    cwd=source_tree.ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == status, done.stderr
  assert words in done.stdout
  found = json.loads(file.read_text())['cases']
  assert [c['name'] for c in found] == [n.lower() for n in names.split(',')]
  assert all(bool(c['problems']) == (c['name'] != 'good') for c in found)
  if status:
    assert 'error: 2 problems on a40' in done.stderr


@matmul.needs_wheels
@pytest.mark.parametrize('device', DEVICES)
def test_every_kernel_of_attention_compiles(device: str) -> None:
  """Each for one of the devices, of one of the models that have it.

  Left to `--slow` are those of float32, which few serve on a GPU: they have no
  tensor cores' products, and take long to compile. And those of pages in 8 bits
  that are others' in parts: float8's, which are read as int8's, but for one
  (bounds_test.py has A100's), and those of small pages.
  """
  with compiler.on(device):
    kernels = {
      (
        case.args[0].shape[-1],
        # A tile of decodes has at least the heads of a group.
        case.args[0].shape[1] > 16 * layout.sizes(case.args[1])[1],
        case.name.partition(' ')[2],
      ): case
      for case in configurations.cases(device)
      if case.args[0].dtype != 'float32' and not _is_in_others(case)
    }
  check_all(_turns(kernels.values(), device), device)


@matmul.needs_wheels
@pytest.mark.slow
@pytest.mark.parametrize('device', DEVICES)
def test_every_configuration_compiles_for_every_device(device: str) -> None:
  check_all(configurations.cases(device), device)


@matmul.needs_wheels
@pytest.mark.parametrize('device', DEVICES)
def test_every_filter_compiles(device: str) -> None:
  """In one launch, and for all devices: registers are just enough."""
  for result in check_all(filter_cases.cases(device), device):
    assert [kernel.name for kernel in result.kernels] == ['least_kept']


@matmul.needs_wheels
@pytest.mark.parametrize('device', DEVICES)
def test_every_product_of_groups_compiles(device: str) -> None:
  """Each for one of the devices; of codes grouped_codes_test.py has some.

  A model's that differ from another's in sizes alone are left to `--slow`.
  """
  plain = (
    case
    for case in grouped_cases.cases(device)
    if isinstance(case, grouped_cases.GroupingCase)
    or (case.codes is None and 'qwen3-235b' not in case.name)
  )
  check_groups(device, _turns(plain, device))


@matmul.needs_wheels
@pytest.mark.slow
@pytest.mark.parametrize('device', DEVICES)
def test_every_product_of_groups_compiles_for_every_device(device: str) -> None:
  check_groups(device, list(grouped_cases.cases(device)))


def check_groups(device: str, chosen: Sequence[grouped_cases.Case]) -> None:
  """Compiles cases: several blocks at a time where tokens are few."""
  for case, result in zip(chosen, check_all(chosen, device), strict=True):
    (kernel,) = (kernel for kernel in result.kernels if kernel.is_ours)
    if isinstance(case, grouped_cases.GroupingCase):
      assert kernel.name == 'group_rows'
      continue
    assert kernel.name == 'grouped_matmul' + '_codes' * (case.codes is not None)
    few = case.spec.num_tokens * case.spec.chosen <= 64 * case.spec.num_groups
    assert kernel.blocks_per_sm >= (2 if few else 1), case.name


@matmul.needs_wheels
@pytest.mark.parametrize('device', DEVICES)
def test_every_rotation_compiles(device: str) -> None:
  """Each for one of the devices."""
  check_rotations(device, _turns(rotate_cases.cases(device), device))


@matmul.needs_wheels
@pytest.mark.slow
@pytest.mark.parametrize('device', DEVICES)
def test_every_rotation_compiles_for_every_device(device: str) -> None:
  check_rotations(device, list(rotate_cases.cases(device)))


def check_rotations(device: str, chosen: Sequence[rotate_cases.Case]) -> None:
  """Compiles cases: in one launch of ours, whatever pages are kept in."""
  for result in check_all(chosen, device):
    ours = [kernel.name for kernel in result.kernels if kernel.is_ours]
    assert ours == ['rotate_and_write']


@matmul.needs_wheels
@pytest.mark.parametrize('device', DEVICES)
def test_every_sum_and_norm_compiles(device: str) -> None:
  """In one launch, several at a time on a multiprocessor."""
  for result in check_all(norm_cases.cases(device), device):
    (kernel,) = result.kernels
    assert kernel.name == 'add_and_norm'
    assert kernel.blocks_per_sm >= 2


_FLOAT8 = 'mistral-7b bfloat16 KV float8_e4m3fn'


def _is_in_others(case: configurations.Case) -> bool:
  """Whether a case of pages in 8 bits has nothing that no other one has."""
  is_float8 = 'float8' in case.name
  is_small = 'KV' in case.name and 'pages' in case.name
  return is_small or (is_float8 and case.name != _FLOAT8)


def _turns(all_cases: Iterable[_Case], device: str) -> list[_Case]:
  """Returns the cases that are one device's to compile, whatever their order.

  They are chosen by name, so that a new case does not move the others.
  """
  return [
    case
    for case in all_cases
    if zlib.crc32(case.name.encode()) % len(DEVICES) == DEVICES.index(device)
  ]


def check_all(chosen: Iterable[cases.Case], device: str) -> list[cases.Result]:
  """Compiles cases, of which none may have a problem."""
  results = cases.check(chosen, device)
  assert results
  assert not {r.name: r.problems for r in results if r.problems}
  return results


def _step(
  tmp_path: pathlib.Path, device: str, config: str, *args: str, **environ: str
) -> Any:
  """What the command says of a step, and its exit status."""
  file = tmp_path / 'aot.json'
  done = subprocess.run(
    [
      sys.executable,
      '-m',
      'sarathi_jax.plan',
      f'--device={device}',
      f'--config={config}',
      f'--json={file}',
      *args,
    ],
    cwd=source_tree.ROOT,
    env=os.environ | environ,
    check=False,
  )
  found = json.loads(file.read_text())
  return found['step'] | {
    'memory': found['memory'],
    'problems': found['problems'],
  }, done.returncode


@matmul.needs_wheels
@pytest.mark.slow
def test_mistrals_step_compiles_in_place(tmp_path: pathlib.Path) -> None:
  """For A40; deployments_test.py has the other devices."""
  case, status = _step(tmp_path, 'a40', 'configs/mistral_7b_a100.py')
  assert not case['problems']
  assert status == 0
  assert case['memory']['weights'] > 13 * 2**30
  assert case['memory']['kv_cache'] > 2 * 2**30
  assert case['memory']['temporaries'] < 2**30
  assert case['graphs'] == 1
  assert not case['outside_graphs']


@matmul.needs_wheels
@pytest.mark.slow
def test_a_step_of_decodes_is_one_graph(tmp_path: pathlib.Path) -> None:
  case, status = _step(
    tmp_path, 'h100', 'configs/mistral_7b_h100.py', '--tokens=128'
  )
  assert status == 0
  assert case['name'].endswith(', 128 tokens, decodes')
  ours = {kernel['name'] for kernel in case['kernels'] if kernel['is_ours']}
  assert 'attend_small' in ours and 'attend_chunks' not in ours
  assert (case['graphs'], case['outside_graphs']) == (1, [])


@matmul.needs_wheels
@pytest.mark.slow
def test_a_step_that_the_host_waits_in_is_refused(
  tmp_path: pathlib.Path,
) -> None:
  """As XLA has it by itself: it puts no loop into a graph."""
  config = tmp_path / 'shallow.py'
  config.write_text(_SHALLOW)
  case, status = _step(
    tmp_path,
    'h100',
    str(config),
    XLA_FLAGS='--xla_gpu_enable_command_buffer=-WHILE',
  )
  assert status == 1
  assert 'kConditional, kWhile in no CUDA graph' in case['problems'][0]
