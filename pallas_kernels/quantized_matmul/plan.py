# SPDX-License-Identifier: Apache-2.0
"""Cuts a product into work items, for the blocks of a GPU.

An item is a tile of x's rows, some columns of the matrix, and a span of what is
summed over. Items that share columns and span follow one another, so that all
but the first find these in the cache. Where tiles are too few to give each
multiprocessor one, sums are split: each span's go to memory, and are added.
All follows from shapes, so no row's result depends on another's.
"""

from __future__ import annotations

import dataclasses
import math

from pallas_kernels.quantized_matmul import tuning

_FEWEST_TURNS = 4  # of a span, to fill the pipeline
_SUM_BYTES = 4  # float32's
_NARROWEST = 64  # columns, to which tiles are cut before sums are split
_MOST_PARTS = 4  # of a turn
_DEPTH_OF_ZEROS = 64  # rows of a turn, whose zeros two blocks have room for
_FILLED = 0.75  # of the multiprocessors, at least


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
  """How a product is cut.

  Attributes:
    shape: of the product.
    sizes: of a tile; `columns` and `depth` are at most those of `tuning`.
    part: rows of the matrix that are multiplied at a time: all of a group.
    splits: of the sums.
  """

  shape: tuning.Shape
  sizes: tuning.Sizes
  part: int
  splits: int

  @property
  def has_scaled_numbers(self) -> bool:
    """Whether what is multiplied has its scales already; see `tile`."""
    return _has_scaled_numbers(self.shape, self.sizes)

  @property
  def has_zeros_as_codes(self) -> bool:
    """Whether zeros are loaded as codes lie; see `tile`."""
    return self.sizes.columns_first and _has_small_groups(self.shape, self.part)

  @property
  def has_sums_of_groups(self) -> bool:
    """Whether a group's sum is multiplied by its scales."""
    return self.shape.has_groups and not self.has_scaled_numbers

  @property
  def row_tiles(self) -> int:
    return -(-self.shape.num_rows // self.sizes.rows)

  @property
  def column_tiles(self) -> int:
    return -(-self.shape.num_out // self.sizes.columns)

  @property
  def num_items(self) -> int:
    return self.row_tiles * self.column_tiles * self.splits

  @property
  def turns(self) -> int:
    """The whole turns of all spans together."""
    return self.shape.num_in // self.sizes.depth

  @property
  def rest(self) -> int:
    """The rows of the matrix that are left after the whole turns."""
    return self.shape.num_in % self.sizes.depth

  @property
  def values_bytes(self) -> int:
    """The bytes of the codes."""
    shape = self.shape
    return -(-shape.num_in * shape.num_out * shape.bits // 8)

  @property
  def sums_bytes(self) -> int:
    """The bytes of sums that are written, and then read."""
    if self.splits == 1:
      return 0
    return (
      2 * _SUM_BYTES * self.splits * self.shape.num_rows * self.shape.num_out
    )


def _has_scaled_numbers(shape: tuning.Shape, sizes: tuning.Sizes) -> bool:
  # For few rows, sums of groups are fewer than codes.
  return shape.may_scale_numbers and sizes.rows >= tuning.FEW_ROWS


def _has_small_groups(shape: tuning.Shape, part: int) -> bool:
  """Says whether zeros cost more than their loads, each for all its codes."""
  return shape.has_zero and part <= _DEPTH_OF_ZEROS


def of_tile(shape: tuning.Shape, sizes: tuning.Sizes) -> Plan:
  """Returns how a product is cut into tiles of a size, its sums not split."""
  columns = min(sizes.columns, 1 << (shape.num_out.bit_length() - 1))
  # Hopper's products have 64 rows of the first operand, at least.
  columns_first = sizes.columns_first and columns >= _NARROWEST
  part = depth = sizes.depth
  if shape.has_groups and not _has_scaled_numbers(shape, sizes):
    part = min(part, shape.group & -shape.group)
    # What is loaded for each group takes registers, as do sums of many rows.
    parts = 2 if columns_first else 128 // sizes.rows
    depth = min(depth, part * min(_MOST_PARTS, parts))
    if columns_first and _has_small_groups(shape, part):
      depth = min(depth, _DEPTH_OF_ZEROS)
  sizes = dataclasses.replace(
    sizes, columns=columns, depth=depth, columns_first=columns_first
  )
  return Plan(shape, sizes, part, 1)


def of(shape: tuning.Shape, sizes: tuning.Sizes, multiprocessors: int) -> Plan:
  """Returns how a product is cut.

  Args:
    shape: of the product.
    sizes: the largest tile.
    multiprocessors: of the device.
  """
  row_tiles = -(-shape.num_rows // sizes.rows)
  wanted = math.ceil(_FILLED * multiprocessors)

  def tiles_of(columns: int) -> int:
    return row_tiles * -(-shape.num_out // columns)

  columns, depth = sizes.columns, sizes.depth
  if columns > _NARROWEST and 2 * tiles_of(columns) <= multiprocessors:
    columns //= 2
    if sizes.rows < tuning.FEW_ROWS:  # As many bytes are under way.
      depth *= 2
  whole = of_tile(
    shape, dataclasses.replace(sizes, columns=columns, depth=depth)
  )
  # Sums that are split may be half as many bytes as the codes.
  most = min(
    whole.turns // _FEWEST_TURNS,
    whole.values_bytes // (4 * _SUM_BYTES * shape.num_rows * shape.num_out),
  )
  splits = min(-(-wanted // tiles_of(whole.sizes.columns)), most)
  return dataclasses.replace(whole, splits=max(splits, 1))
