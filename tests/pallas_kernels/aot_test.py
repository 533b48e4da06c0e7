# SPDX-License-Identifier: Apache-2.0
"""Compiling for GPUs that are not here: what must be refused is.

Those marked `aot` need the wheels of that extra; scripts/test brings them.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
import json
import pathlib
import subprocess
import sys
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
import jax.numpy as jnp
import pytest

from pallas_kernels import aot
from pallas_kernels import gpu_targets
from pallas_kernels.ragged_paged_attention import tuning
from tests import source_tree

pytestmark = pytest.mark.filterwarnings(
  'ignore:.*Pallas Triton backend is deprecated:DeprecationWarning')
DEVICES = list(gpu_targets.TARGETS)
CONFIGS = {'a100': 'mistral_7b_a100', 'a40': 'mistral_7b_a100',
           'h100': 'mistral_7b_h100'}
_MISSING = aot.missing()


def needs_wheels(test: Callable[..., None]) -> Any:
  skip = pytest.mark.skipif(_MISSING is not None, reason=str(_MISSING))
  return pytest.mark.aot(skip(test))


@dataclasses.dataclass(frozen=True)
class Matmul:
  """A kernel with one tile, as large as it likes."""

  name: str
  rows: int
  columns: int
  num_stages: int
  inner: int = 1024
  block: int = 64

  def _kernel(self, x_ref: Any, y_ref: Any, out_ref: Any) -> None:
    def body(i: jax.Array, acc: jax.Array) -> jax.Array:
      at = pl.ds(i * self.block, self.block)
      return acc + plgpu.dot(
        plgpu.load(x_ref.at[:, at]), plgpu.load(y_ref.at[at, :]))

    acc = jax.lax.fori_loop(0, self.inner // self.block, body, jnp.zeros(
      (self.rows, self.columns), jnp.float32))
    plgpu.store(out_ref.at[:, :], acc.astype(out_ref.dtype))

  def function(self, x: jax.Array, y: jax.Array) -> Any:
    return pl.pallas_call(
      self._kernel, name=self.name, grid=(1,),
      out_shape=jax.ShapeDtypeStruct((self.rows, self.columns), x.dtype),
      compiler_params=plgpu.CompilerParams(
        num_warps=4, num_stages=self.num_stages))(x, y)

  @property
  def args(self) -> Any:
    return (jax.ShapeDtypeStruct((self.rows, self.inner), jnp.bfloat16),
            jax.ShapeDtypeStruct((self.inner, self.columns), jnp.bfloat16))


GOOD = Matmul('good', 64, 64, 3)
SPILLS = Matmul('spills', 256, 256, 2)
TOO_MUCH_SHARED = Matmul('too_much_shared', 128, 128, 5)


def test_ptxas_log_is_read() -> None:
  log = '''\
ptxas warning : Registers are spilled to local memory in function 'rpa__1', \
48 bytes spill stores, 52 bytes spill loads
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'rpa__1' for 'sm_80'
ptxas info    : Function properties for rpa__1
    56 bytes stack frame, 48 bytes spill stores, 52 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 400 bytes cmem[0]
ptxas info    : Compile time = 381.139 ms
ptxas info    : Compiling entry function 'merge' for 'sm_80'
ptxas info    : Function properties for merge
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers
'''
  assert aot.parse_ptxas(log) == {'rpa__1': (255, 100), 'merge': (40, 0)}


def test_launches_are_read() -> None:
  thunks = '''\
001: kCustomKernel [source | next=002 (1)] rpa__1 grid: [480, 1, 1] threads: \
[128, 1, 1]  shared_memory: 53248 bytes
002: kCopy [prev=001 (1) | next=003 (1)] copy.1
003: kKernel [prev=001 (1) | sink        ] fusion.2 grid: [2, 1, 1] threads: \
[32, 4, 1]  shared_memory: 0 bytes
'''
  assert aot.parse_launches(thunks) == {
    'rpa__1': (128, 53248), 'fusion.2': (128, 0)}


@pytest.mark.parametrize(('device', 'usage', 'expected'), [
  ('a100', (128, 168, 53248), 3),  # by registers and shared memory
  ('a40', (128, 168, 53248), 1),  # by shared memory
  ('a40', (128, 40, 0), 12),  # by threads
  ('a40', (32, 16, 0), 16),  # by blocks
  ('a100', (32, 16, 0), 32),
  ('h100', (128, 255, 0), 2),  # by registers
  ('h100', (1024, 65, 0), 0),  # more registers than there are
  ('a40', (128, 40, 101377), 0),
])
def test_blocks_that_fit(device: str, usage: tuple[int, int, int],
                         expected: int) -> None:
  assert gpu_targets.get(device).blocks_that_fit(*usage) == expected


@pytest.mark.parametrize('device', DEVICES)
def test_a_target_is_consistent(device: str) -> None:
  target = gpu_targets.get(device)
  # CUDA keeps a KiB of each block's shared memory for itself.
  assert target.shared_memory == target.shared_memory_per_block + 1024
  text = target.text_proto()
  assert text.count('{') == text.count('}')
  assert f'device_description_str: "{target.device_kind}"' in text
  assert ('ACCELERATED_FEATURES' in text) == (device == 'h100')


def test_unknown_devices_are_refused() -> None:
  with pytest.raises(ValueError, match=r"'b200': must be one of a100, a40"):
    aot.device_for('b200')


def test_missing_wheels_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(aot.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(aot.UnavailableError,
                     match=r"pip install 'sarathi-jax\[aot\]'"):
    aot.device_for.__wrapped__('a40')


@pytest.mark.parametrize(('update', 'donated', 'expected'), [
  (lambda kv, x: kv.at[3].set(x), True, []),
  (lambda kv, x: kv.at[3].set(x), False,
   ['0 bytes are updated in place', 'copies of the KV cache']),
  (lambda kv, x: (kv.at[3].set(x), kv.at[4].set(x)), True,
   ['copies of the KV cache']),
])
def test_copies_of_the_cache_are_found(
    update: Callable[..., Any], donated: bool, expected: list[str]) -> None:
  kv, x = jnp.zeros((64, 4, 128)), jnp.ones((4, 128))
  compiled = jax.jit(update, donate_argnums=0 if donated else ()).lower(
    kv, x).compile()
  problems = aot.in_place_problems(compiled, kv, kv)
  assert len(problems) == len(expected)
  for problem, words in zip(problems, expected, strict=True):
    assert words in problem


@needs_wheels
def test_a_good_kernel_passes() -> None:
  result, = aot.check([GOOD], 'a40')
  assert not result.problems
  kernel, = result.kernels
  assert (kernel.name, kernel.is_ours, kernel.threads) == ('good', True, 128)
  assert 32 < kernel.registers < 255
  assert kernel.spill_bytes == 0
  assert kernel.shared_memory >= 2 * 64 * 64 * 2  # a block of each operand
  assert kernel.blocks_per_sm >= 2


@needs_wheels
def test_a_kernel_is_measured_each_time() -> None:
  """XLA keeps what it compiled before: ptxas must not be left out."""
  first, second = aot.check([GOOD, dataclasses.replace(GOOD)], 'a100')
  assert first.kernels == second.kernels
  assert not first.problems and not second.problems


@needs_wheels
def test_spills_are_refused() -> None:
  result, = aot.check([SPILLS], 'a40')
  assert len(result.problems) == 1
  assert 'spills: spills ' in result.problems[0]
  assert result.kernels[0].registers == 255


@needs_wheels
def test_what_ptxas_calls_slow_is_told() -> None:
  result, = aot.check([SPILLS], 'h100')
  assert any('wgmma' in warning for warning in result.warnings)


@needs_wheels
def test_shared_memory_is_that_of_the_device() -> None:
  result, = aot.check([TOO_MUCH_SHARED], 'a40')
  assert 'Shared memory size limit exceeded' in result.problems[0]
  assert '101376' in result.problems[0]
  result, = aot.check([TOO_MUCH_SHARED], 'a100')
  assert not result.problems
  assert result.kernels[0].shared_memory > 101376


@needs_wheels
def test_a_case_without_a_kernel_is_refused() -> None:
  case = tuning.Case('jnp', functools.partial(jnp.add, 1), GOOD.args[:1])
  result, = aot.check([case], 'a40')
  assert result.problems == ['there is no Pallas kernel in it']


@needs_wheels
def test_compile_for_takes_options_of_jit() -> None:
  kv = jax.ShapeDtypeStruct((64, 8, 64, 128), jnp.bfloat16)
  compiled = aot.compile_for(
    lambda kv: kv.at[3].set(1), (kv,), 'h100', donate_argnums=0)
  assert not aot.in_place_problems(compiled, kv, kv)


_COMMAND = '''
from absl import app
from pallas_kernels import aot
from pallas_kernels.ragged_paged_attention import tuning
from tests.pallas_kernels import aot_test
import sys
names = sys.argv.pop(1).split(',')
tuning.cases = lambda device: (getattr(aot_test, name) for name in names)
aot.define_flags()
app.run(aot.main)
'''


@needs_wheels
@pytest.mark.parametrize(('names', 'status', 'words'), [
  ('GOOD', 0, '1 of 1 compile for a40'),
  ('GOOD,SPILLS,TOO_MUCH_SHARED', 1, 'spills: spills: spills '),
])
def test_command(names: str, status: int, words: str,
                 tmp_path: pathlib.Path) -> None:
  file = tmp_path / 'aot.json'
  done = subprocess.run(
    [sys.executable, '-c', _COMMAND, names, '--device=a40', f'--json={file}'],
    cwd=source_tree.ROOT, capture_output=True, text=True, check=False)
  assert done.returncode == status, done.stderr
  assert words in done.stdout
  cases = json.loads(file.read_text())['cases']
  assert [c['name'] for c in cases] == [n.lower() for n in names.split(',')]
  assert all(bool(c['problems']) == (c['name'] != 'good') for c in cases)
  if status:
    assert 'error: 2 problems on a40' in done.stderr


@needs_wheels
@pytest.mark.slow
@pytest.mark.parametrize('device', DEVICES)
def test_every_configuration_compiles(device: str) -> None:
  results = aot.check(tuning.cases(device), device)
  assert results
  assert not {r.name: r.problems for r in results if r.problems}


@needs_wheels
@pytest.mark.slow
@pytest.mark.parametrize('device', DEVICES)
def test_mistrals_step_compiles_in_place(device: str) -> None:
  config = source_tree.ROOT / 'configs' / f'{CONFIGS[device]}.py'
  result, memory = aot.check_step(str(config), device)
  assert not result.problems
  assert memory.weights > 13 * 2**30
  assert memory.kv_cache > 2 * 2**30
  assert memory.temporaries < 2**30
