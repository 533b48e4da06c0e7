# SPDX-License-Identifier: Apache-2.0
"""The sizes that implementations take, and which of them where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import jax

from pallas_kernels import devices
from pallas_kernels.grouped_matmul import coded
from pallas_kernels.quantized_matmul import operand
from pallas_kernels.quantized_matmul import plan as quantized_plan
from pallas_kernels.quantized_matmul import tuning as quantized_tuning

# XLA's on CPUs: with so many rows for each group on average, at most -> rows of
# a block. Chosen by times on one core of an EPYC (Zen 4), float32: one row is
# multiplied as its matrix is read, in place, and of more rows the matrix is
# copied first, once a group, after which 16 rows or more are computed at 80 %
# of the rate.
_XLA_ROWS: tuple[tuple[int, int], ...] = ((4, 1), (8, 8), (64, 16))
_XLA_MOST_ROWS = 32


def xla_rows(num_rows: int, num_groups: int) -> int:
  """Returns the rows of a block of `xla`.

  Follows from shapes alone, so that no row's result depends on the others'.
  """
  for most, rows in _XLA_ROWS:
    if num_rows <= most * num_groups:
      return rows
  return _XLA_MOST_ROWS


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
  """The shape that a kernel is compiled for.

  Attributes:
    dtype: of rows.
    num_rows, num_groups, num_in, num_out: R, G and the sizes of a matrix.
    num_kinds: of matrices.
    has_zero: whether these are codes whose groups have zeros.
  """

  dtype: str
  num_rows: int
  num_groups: int
  num_in: int
  num_out: int
  num_kinds: int
  has_zero: bool = False

  @classmethod
  def of(cls, x: Any, matrices: Sequence[Any], rows: Any) -> Shape:
    """Returns the shape of a call; see `api.grouped_matmul`."""
    first, has_zero = matrices[0], False
    if isinstance(first, operand.Operand):
      first, has_zero = first.scale, first.zero is not None
    num_groups, *_, num_out = first.shape
    return cls(
      x.dtype.name,
      rows.shape[0],
      num_groups,
      x.shape[1],
      num_out,
      len(matrices),
      has_zero,
    )

  @property
  def itemsize(self) -> int:
    return jax.numpy.dtype(self.dtype).itemsize


# Of multiplying a tile: of each, the rows of its products, from few to all.
Ways = tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Sizes:
  """A tile of the GPU kernel; see `pallas_triton`.

  Attributes:
    rows: of a group.
    columns: of a matrix; in the tables, of all kinds together.
    depth: numbers of a row that are multiplied at a time.
    num_warps: of a block of the GPU.
    num_stages: of the pipeline that loads.
    ways: of multiplying it: the first that has room for the rows there are is
      taken.
  """

  rows: int
  columns: int
  depth: int
  num_warps: int
  num_stages: int
  ways: Ways = ()  # once made, never none: all rows at once

  def __post_init__(self) -> None:
    object.__setattr__(self, 'ways', self.ways or ((self.rows,),))

  def way(self, num: int) -> tuple[int, ...]:
    """Returns how a tile that has so many rows is multiplied."""
    return next(way for way in self.ways if num <= sum(way))

  def for_shape(self, shape: Shape) -> Sizes:
    """Returns these, or less where that does not divide a matrix."""
    return dataclasses.replace(
      self,
      columns=fitting(shape.num_out, max(self.columns // shape.num_kinds, 16)),
      depth=fitting(shape.num_in, self.depth),
    )


def fitting(size: int, most: int) -> int:
  """Returns the largest power of two that divides a size, `most` at most."""
  return min(size & -size, 1 << (most.bit_length() - 1))


_LEAST = 16  # that a side of a product has on a GPU
# With so many rows for each group on average, at most -> the tile. Tokens that
# are few enough to be decodes thus find room in a tile even if all choose the
# same groups: of 128 of which each takes 8, 16 tokens, 32, and 64.
_Table = tuple[tuple[int, Sizes], ...]
_MANY = 2**31
# Chosen by machine code. A tensor core multiplies 16 rows at least. A product
# of Triton's has a power of two of rows; one of 64 takes more registers than
# two of 32, and eight warps would compute it twice. All ways of a tile are of
# one instruction, so that sums have one order: on Hopper 64 rows and more are
# multiplied by another, so that a tile of 128 has one way alone.
_TO_32: Ways = ((16,), (32,))
_TO_64: Ways = (*_TO_32, (32, 16), (32, 32))
_TO_128: Ways = ((32,), (32, 32), (32, 32, 32), (128,))
_HALF: Mapping[str, _Table] = {
  'a100': (
    (1, Sizes(16, 128, 64, 4, 4)),
    (2, Sizes(32, 128, 64, 4, 3, _TO_32)),
    (64, Sizes(64, 128, 64, 4, 3, _TO_64)),
    (_MANY, Sizes(128, 128, 64, 8, 3, _TO_128)),
  ),
  'a40': (
    (1, Sizes(16, 128, 32, 4, 4)),
    (2, Sizes(32, 128, 32, 4, 3, _TO_32)),
    (64, Sizes(64, 128, 32, 4, 3, _TO_64)),
    (_MANY, Sizes(128, 128, 32, 8, 3, _TO_128)),
  ),
  'h100': (
    (1, Sizes(16, 128, 64, 4, 4)),
    (2, Sizes(32, 128, 64, 4, 3, _TO_32)),
    (64, Sizes(64, 128, 64, 4, 3, _TO_64)),
    (_MANY, Sizes(128, 128, 64, 8, 3)),
  ),
}
_FLOAT32: _Table = (
  (1, Sizes(16, 64, 32, 4, 2)),
  (_MANY, Sizes(32, 64, 32, 4, 2)),
)
# Of several kinds in codes: registers hold no more, nor as many columns.
_DEPTH_OF_SEVERAL = 64
# What `implementation=None` means on a GPU that it supports, until a
# measurement says otherwise.
_FASTEST = 'pallas_triton'


def choose(shape: Shape) -> Sizes:
  """Returns the sizes for a shape, on the default device; CPUs interpret.

  Raises:
    NotImplementedError: the kernel can't run there, or not for such a shape.
  """
  device = devices.default()
  devices.check_triton(device)
  for name in ('num_in', 'num_out'):
    size = getattr(shape, name)
    if size % _LEAST:
      raise NotImplementedError(
        f'pallas_triton: {name}={size}: must be a multiple of {_LEAST}.'
      )
  if shape.itemsize not in (2, 4):
    raise NotImplementedError(
      f'pallas_triton: dtype={shape.dtype}: must be float32, bfloat16 or '
      'float16.'
    )
  return _largest(shape, device)


def choose_coded(shape: Shape, how: coded.Coded) -> quantized_plan.Plan:
  """Returns how a block multiplies its rows by codes: as one that has as many.

  Raises:
    NotImplementedError: see `choose`.
  """
  device = devices.default()
  devices.check_triton(device)
  if how.activations is not None:
    shape = dataclasses.replace(shape, dtype='bfloat16')
  num_rows = _largest(shape, device).rows
  dtype = shape.dtype
  if how.activations is not None and quantized_tuning.takes_fp8(
    num_rows, how.by_columns
  ):
    dtype = quantized_tuning.FP8
  of_tile = quantized_tuning.Shape(
    dtype,
    how.codes,
    num_rows,
    shape.num_in,
    shape.num_out,
    how.group or shape.num_in,
    how.by_columns,
    shape.has_zero,
  )
  return plan_coded(of_tile, quantized_tuning.choose(of_tile), shape.num_kinds)


def plan_coded(
  of_tile: quantized_tuning.Shape,
  sizes: quantized_tuning.Sizes,
  num_kinds: int,
) -> quantized_plan.Plan:
  """Returns the plan of a block; its columns are of all kinds together."""
  columns = max(sizes.columns // num_kinds, _LEAST)
  depth = sizes.depth
  if num_kinds > 1 and sizes.rows == quantized_tuning.FEW_ROWS:
    columns, depth = columns // 2, min(depth, _DEPTH_OF_SEVERAL)
  return quantized_plan.of_tile(
    of_tile, dataclasses.replace(sizes, columns=columns, depth=depth)
  )


def _largest(shape: Shape, device: Any) -> Sizes:
  table = _FLOAT32
  if shape.itemsize == 2:
    table = _HALF[devices.target_of(device)]
  return next(
    sizes for most, sizes in table if shape.num_rows <= most * shape.num_groups
  )


def fastest(x: Any, matrices: Sequence[Any], rows: Any, matmul: Any) -> str:
  """Returns the fastest implementation of a call, on the default device.

  Args:
    x, matrices, rows, matmul: see `api.grouped_matmul`.
  """
  is_coded = isinstance(matmul, coded.Coded)
  if devices.default().platform == 'cpu' or not (is_coded or matmul is None):
    return 'xla'
  shape = Shape.of(x, matrices, rows)
  try:
    if is_coded:
      choose_coded(shape, matmul)
    else:
      choose(shape)
  except NotImplementedError:
    return 'xla'
  return _FASTEST
