# SPDX-License-Identifier: Apache-2.0
"""Products with matrices in panels, as a CPU's kernel makes them."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
from llvmlite import binding
from llvmlite import ir
import numpy as np
import pytest

from pallas_kernels import panel_matmul
from pallas_kernels.llvm import calls
from pallas_kernels.llvm import kept as kept_lib
from pallas_kernels.llvm import panels
from pallas_kernels.llvm import threads
from pallas_kernels.panel_matmul import kernel
from pallas_kernels.panel_matmul import reference

pytestmark = pytest.mark.skipif(
  panels.tile() is None, reason='no such processor'
)
grouped = jax.jit(panel_matmul.grouped_matmul)


def normal(*shape: int) -> np.ndarray:
  return np.random.default_rng(len(shape)).standard_normal(shape, np.float32)


def test_panels_are_a_matrix_in_another_order():
  w = normal(3, 5, 48)
  panels = panel_matmul.to_panels(w)
  assert panels.shape == (3, 3, 80)
  np.testing.assert_array_equal(panels[1, 2].reshape(5, 16), w[1, :, 32:])
  np.testing.assert_array_equal(panel_matmul.from_panels(panels), w)


@pytest.mark.parametrize('num_in,num_out', [(1, 16), (40, 112), (129, 48)])
@pytest.mark.parametrize('num_rows', [0, 1, 5, 6, 11, 12, 13, 40])
def test_it_is_the_product(num_rows, num_in, num_out):
  x, w = normal(num_rows, num_in), normal(1, num_in, num_out)[0]
  got = jax.jit(panel_matmul.matmul)(x, panel_matmul.to_panels(w))
  np.testing.assert_allclose(got, x @ w, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
@pytest.mark.parametrize('num_rows', [1, 8, 12, 33])
def test_16_bits_give_the_bits_of_what_they_widen_to(num_rows, dtype):
  x = normal(num_rows, 77)
  panels = panel_matmul.to_panels(normal(3, 77, 80).astype(jnp.dtype(dtype)))
  # Denormal and huge ones, and what is none.
  panels[:, :, :64] *= jnp.asarray(6e-8, dtype)
  panels[:, 1, 64:80] = jnp.finfo(dtype).max
  panels[:, 2, :16] = np.inf
  sizes = np.array([num_rows - 1, 0, 1], np.int32)
  expected = grouped(x, panels.astype(np.float32), sizes)
  np.testing.assert_array_equal(grouped(x, panels, sizes), expected)


def test_other_dtypes_are_refused_by_name():
  with pytest.raises(NotImplementedError, match='not for panels of int8'):
    grouped(normal(1, 4), np.zeros((1, 1, 64), np.int8), np.ones(1, np.int32))


@pytest.mark.parametrize(
  'sizes', [(30, 0, 1, 2, 0), (0, 0, 0, 0, 33), (1, 1, 1, 1, 1)], ids=str
)
def test_rows_are_multiplied_by_their_groups(sizes):
  x, panels = normal(33, 24), panel_matmul.to_panels(normal(5, 24, 80))
  sizes = np.array(sizes, np.int32)
  # Nobody reads what nobody chose.
  panels[sizes == 0] = np.nan
  expected = reference.grouped_matmul(x, panels, sizes)
  got = grouped(x, panels, sizes)[: len(expected)]
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-4)


def test_a_row_has_the_same_bits_whatever_the_others_are():
  x, panels = normal(40, 200), panel_matmul.to_panels(normal(2, 200, 48))
  whole = grouped(x, panels, np.array([25, 15], np.int32))
  others = np.full_like(x, np.nan)
  for row, group in ((0, 0), (7, 0), (24, 0), (25, 1), (39, 1)):
    alone = others.copy()
    alone[3] = x[row]
    sizes = np.array([9, 4] if group == 0 else [2, 9], np.int32)
    np.testing.assert_array_equal(grouped(alone, panels, sizes)[3], whole[row])


@pytest.mark.parametrize('dtype', panel_matmul.DTYPES)
@pytest.mark.parametrize('processor', panels.TILES, ids=str)
def test_every_processors_tile_gives_the_same_bits(
  processor, dtype, monkeypatch
):
  """By this one's instructions: what they have differs in sizes alone."""
  monkeypatch.setattr(calls, 'processor', lambda: processor)
  target = f'tests.panel_matmul.{processor}.{dtype}'
  assert kernel.register(target, 8, kept_lib.KEPT[dtype])
  x = normal(29, 33)
  w = panel_matmul.to_panels(normal(3, 33, 80).astype(jnp.dtype(dtype)))
  sizes = np.array([1, 17, 11], np.int32)
  call = jax.ffi.ffi_call(target, jax.ShapeDtypeStruct((29, 80), jnp.float32))
  got = jax.jit(call)(x, w, sizes)
  np.testing.assert_array_equal(got, grouped(x, w, sizes))


@pytest.mark.parametrize('name', kept_lib.KEPT)
@pytest.mark.parametrize('triple', ['aarch64-unknown-linux-gnu'])
def test_it_compiles_for_processors_that_are_not_here(
  triple, name, monkeypatch
):
  monkeypatch.setattr(calls, 'processor', lambda: calls.Processor(32, 4))
  binding.initialize_all_targets()
  binding.initialize_all_asmprinters()
  module = ir.Module('absent')
  kept = kept_lib.KEPT[name]
  panels.write_matmul(module, 'matmul', kept=kept).linkage = 'external'
  machine = binding.Target.from_triple(triple).create_target_machine(opt=3)
  assembly = machine.emit_assembly(binding.parse_assembly(str(module)))
  assert 'fmla' in assembly


@pytest.mark.parametrize('looks', [1, 2500])
def test_threads_share_it(looks, monkeypatch):
  """However many there are: a push's devices have no threads to share.

  Who looks once before sleeping does sleep in some of the runs.
  """
  monkeypatch.setattr(threads, '_LOOKS', looks)
  target = f'tests.panel_matmul.{looks}'
  assert kernel.register(target, num_devices=1)
  x, panels = normal(70, 64), panel_matmul.to_panels(normal(4, 64, 16 * 29))
  sizes = np.array([1, 0, 60, 9], np.int32)
  call = jax.ffi.ffi_call(
    target, jax.ShapeDtypeStruct((70, 16 * 29), jnp.float32)
  )
  run = jax.jit(call)
  expected = grouped(x, panels, sizes)
  for _ in range(200):
    np.testing.assert_array_equal(run(x, panels, sizes), expected)


def test_machine_code_is_kept_where_jax_keeps_its_own(tmp_path, monkeypatch):
  x, w = normal(3, 8), panel_matmul.to_panels(normal(1, 8, 16))
  sizes = np.array([3], np.int32)
  register = jax.ffi.register_ffi_target
  numbers = itertools.count()

  def product() -> np.ndarray:
    """Compiles the same module again, for XLA by a name of its own."""
    target = f'tests.kept.{next(numbers)}'
    monkeypatch.setattr(
      jax.ffi,
      'register_ffi_target',
      lambda name, *args, **fields: register(target, *args, **fields),
    )
    assert kernel.register('tests.kept', 8)
    shape = jax.ShapeDtypeStruct((3, 16), jnp.float32)
    return np.asarray(jax.jit(jax.ffi.ffi_call(target, shape))(x, w, sizes))

  before = jax.config.jax_compilation_cache_dir
  jax.config.update('jax_compilation_cache_dir', str(tmp_path))
  try:
    expected = product()
    (file,) = tmp_path.glob('llvm-*')
    whole = file.read_bytes()
    with monkeypatch.context() as patch:
      patch.setattr(calls, '_machine_code', None)  # It is not called.
      np.testing.assert_array_equal(product(), expected)
    # What is damaged is made anew.
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    np.testing.assert_array_equal(product(), expected)
    assert file.read_bytes() == whole
  finally:
    jax.config.update('jax_compilation_cache_dir', before)
