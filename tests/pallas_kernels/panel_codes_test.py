# SPDX-License-Identifier: Apache-2.0
"""Products with codes in panels, as a CPU's kernel makes them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import panel_matmul
from pallas_kernels import quantized_matmul
from pallas_kernels.llvm import calls
from pallas_kernels.llvm import kept as kept_lib
from pallas_kernels.llvm import panels
from pallas_kernels.panel_matmul import kernel
from pallas_kernels.quantized_matmul import operand

pytestmark = pytest.mark.skipif(
  panels.tile() is None, reason='no such processor'
)
# Codes, rows of a group, and whether groups have codes of 0.
WAYS = [
  ('int8', None, False),
  ('int8', 24, False),
  ('fp8', None, False),
  ('fp8', 32, False),
  ('int4', None, False),
  ('int4', 32, False),
  ('int4', 64, True),
  ('mxfp4', 32, False),
]


def make(
  way: tuple[str, int | None, bool], num_in: int, num_out: int, seed: int = 0
) -> operand.Operand:
  """Makes a matrix of all codes that there are, but for NaN."""
  codes, group, has_zeros = way
  rng = np.random.default_rng(seed)
  kind = operand.CODES[codes]
  rows = num_in if kind.bits == 8 else 16 * -(-num_in // 32)
  values = rng.integers(0, 256, (rows, num_out), np.uint8)
  if codes == 'fp8':
    values[values & 127 == 127] = 0
  scales = 1 if group is None else -(-num_in // group), num_out
  if kind.scale == 'uint8':
    scale = rng.integers(110, 140, scales, np.uint8)
    scale[0, 0] = 2  # which half of is no denormal number
  else:
    scale = rng.uniform(0.5, 2, scales).astype(np.float32)
  zero = rng.integers(0, 16, scales, np.uint8) if has_zeros else None
  return operand.Operand(values.view(jnp.dtype(kind.dtype)), scale, zero)


def in_panels(
  ways: tuple[str, int | None, bool], matrices: list[operand.Operand]
) -> tuple[Any, panel_matmul.Coded]:
  """Returns matrices as the kernel takes them."""

  def stacked(arrays: Any) -> Any:
    arrays = list(arrays)
    if arrays[0] is None:
      return None
    return panel_matmul.to_panels(np.stack(arrays))

  if operand.CODES[ways[0]].bits == 4:
    matrices = [
      w._replace(values=panel_matmul.in_pairs(w.values)) for w in matrices
    ]
  values, scale, zero = map(stacked, zip(*matrices, strict=True))
  return values, panel_matmul.Coded(ways[0], scale, zero, ways[1])


def multiply(
  way: tuple[str, int | None, bool],
  x: np.ndarray,
  matrices: list[operand.Operand],
  sizes: list[int],
) -> np.ndarray:
  values, coded = in_panels(way, matrices)

  def product(x: Any, values: Any, sizes: Any, scale: Any, zero: Any) -> Any:
    codes = coded._replace(scale=scale, zero=zero)
    return panel_matmul.grouped_matmul(x, values, sizes, codes)

  return np.asarray(
    jax.jit(product)(
      x, values, np.array(sizes, np.int32), coded.scale, coded.zero
    )
  )


def normal(*shape: int) -> np.ndarray:
  return np.random.default_rng(len(shape)).standard_normal(shape, np.float32)


def test_pairs_are_codes_in_another_order():
  values = make(WAYS[4], 96, 16).values
  pairs = panel_matmul.in_pairs(values)
  np.testing.assert_array_equal(pairs[17] & 15, values[18] & 15)  # row 34
  np.testing.assert_array_equal(pairs[29] >> 4, values[27] >> 4)  # row 59
  np.testing.assert_array_equal(panel_matmul.from_pairs(pairs), values)


@pytest.mark.parametrize('way', WAYS, ids=str)
@pytest.mark.parametrize(
  'num_rows,num_in', [(1, 96), (5, 40), (31, 160), (25, 40), (70, 608)]
)
def test_it_is_the_product(num_rows, num_in, way):
  x, w = normal(num_rows, num_in), make(way, num_in, 112)
  got = multiply(way, x, [w], [num_rows])
  expected = quantized_matmul.quantized_matmul(
    x,
    *map(jnp.asarray, w[:2]),
    codes=way[0],
    group=way[1],
    zero=None if w.zero is None else jnp.asarray(w.zero),
    implementation='reference',
  )
  most = np.abs(expected).max()
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=2e-6 * most)


@pytest.mark.parametrize('way', WAYS, ids=str)
def test_each_code_is_the_number_that_it_stands_for(way):
  """By rows that take one row of the matrix each."""
  num_in = 288
  w = make(way, num_in, 32)
  got = multiply(way, np.eye(num_in, dtype=np.float32), [w], [num_in])
  numbers = operand.numbers(
    jax.tree.map(jnp.asarray, w), way[0], num_in, way[1]
  ).astype(jnp.float32)
  scale = operand.spread(operand.scales(jnp.asarray(w.scale)), num_in, way[1])
  expected = np.asarray(numbers) * np.asarray(scale)
  np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize('way', WAYS, ids=str)
def test_a_row_has_the_same_bits_whatever_the_others_are(way):
  x, pair = normal(40, 576), [make(way, 576, 48, seed) for seed in range(2)]
  whole = multiply(way, x, pair, [25, 15])  # many, and few
  others = np.full_like(x, np.nan)
  for row, group in ((0, 0), (24, 0), (25, 1), (39, 1)):
    alone = others.copy()
    alone[3] = x[row]
    sizes = [9, 4] if group == 0 else [2, 9]
    got = multiply(way, alone, pair, sizes)
    np.testing.assert_array_equal(got[3], whole[row])


@pytest.mark.parametrize('processor', panels.TILES, ids=str)
@pytest.mark.parametrize('way', WAYS[3:], ids=str)
def test_every_processors_tile_gives_the_same_bits(way, processor, monkeypatch):
  """By this one's instructions: what they have differs in sizes alone."""
  x, several = normal(29, 96), [make(way, 96, 80, seed) for seed in range(3)]
  expected = multiply(way, x, several, [1, 17, 11])
  values, coded = in_panels(way, several)
  monkeypatch.setattr(calls, 'processor', lambda: processor)
  target = f'tests.panel_codes.{processor}.{way}'
  assert kernel.register(target, 8, kept_lib.KEPT[coded.kept])
  call = jax.ffi.ffi_call(target, jax.ShapeDtypeStruct((29, 80), jnp.float32))
  got = jax.jit(call)(
    x,
    values,
    np.array([1, 17, 11], np.int32),
    coded.scale,
    coded.scale if coded.zero is None else coded.zero,
    np.array([way[1] or 96], np.int32),
  )
  np.testing.assert_array_equal(got, expected)
