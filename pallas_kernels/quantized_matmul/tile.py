# SPDX-License-Identifier: Apache-2.0
"""What a block of a GPU multiplies by codes: a tile of rows by some columns.

It loads codes, converts each once, and hands them out to its warps as numbers
of x's dtype, through shared memory, where a product of 16 bits has its matrix,
too; so no matrix is put together in memory. Hopper takes them from registers,
where columns are multiplied by rows. Codes are converted without their
scales, exactly; a group's sum is multiplied by its scales, in float32. But
MXFP4's are powers of two, and bfloat16 has the numbers with them exactly: where
rows are many, there is then one sum, of all groups. Scales are then loaded as
codes lie, each as often as there are bytes of its group: threads that convert
have theirs, and nothing is handed out. Zeros are, too, where Hopper takes
numbers from registers: they are then converted as codes are.

Several matrices that multiply the same rows share a loop.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import dataclasses
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
import jax.numpy as jnp

from pallas_kernels import unpacking
from pallas_kernels.quantized_matmul import fp8_dot
from pallas_kernels.quantized_matmul import nibbles
from pallas_kernels.quantized_matmul import operand
from pallas_kernels.quantized_matmul import plan as plan_lib


def readable(array: jax.Array) -> jax.Array:
  """Returns an array as a kernel reads it: Ampere knows no dtype of fp8."""
  if array.dtype != jnp.float8_e4m3fn:
    return array
  return lax.bitcast_convert_type(array, jnp.uint8)


class OfGroup(NamedTuple):
  """What some columns have for a group of rows.

  Attributes:
    scale: [columns], as it is kept.
    zero: [columns] int32, or None.
  """

  scale: jax.Array
  zero: jax.Array | None = None


class Place(NamedTuple):
  """Where rows of a matrix begin that are multiplied at a time.

  What is known only as the kernel runs stays apart from what is not: places of
  a turn then differ by constants, which loads take without an instruction.

  Attributes:
    turn: int32, of the loop.
    depth: rows of a turn.
    part: the row of the turn's.
  """

  turn: Any
  depth: int = 1
  part: int = 0

  def over(self, size: int) -> Any:
    """Returns the place divided by a size, rounded down."""
    if self.depth % size:
      return (self.turn * self.depth + self.part) // size
    return self.turn * (self.depth // size) + self.part // size


@dataclasses.dataclass(frozen=True, slots=True)
class Tile:
  """A tile of rows, and columns of matrices.

  Attributes:
    x_ref: [T, in].
    matrices: of refs, all of one kind and shape.
    plan: how the product is cut.
    rows: [rows] int32, of x.
    columns: a pl.ds, of each matrix.
    interpret: whether Pallas interprets the kernel.
    front: indices of the axes that the matrices have in front.
  """

  x_ref: Any
  matrices: Sequence[operand.Operand]
  plan: plan_lib.Plan
  rows: jax.Array
  columns: Any
  interpret: bool
  front: tuple[Any, ...] = ()

  def products(self, start: Any, stop: Any, item: Any, is_last: Any) -> Any:
    """Returns the products with each matrix, [rows, columns] float32.

    Args:
      start, stop: the turns, of the plan's, of a span of what is summed.
      item: a number that is known only as the kernel runs.
      is_last: whether the span is the last one: rows of the matrix that are
        left after all turns are its own. Where it is False, or they would be
        behind the matrix, 0 is added for them.
    """
    plan, sizes = self.plan, self.plan.sizes
    parts = range(0, sizes.depth if plan.turns else plan.part, plan.part)

    def turn(i: jax.Array, state: Any) -> Any:
      sums, of_groups = state
      following = of_groups
      if sizes.columns_first and len(parts) > 1:
        # It is seen that no place overflows.
        i &= (1 << plan.turns.bit_length()) - 1
      if plan.has_sums_of_groups:  # A turn ahead: products would wait for them.
        following = of_parts(jnp.minimum(i + 1, plan.turns - 1))
      for part, of_group in zip(parts, of_groups, strict=True):
        sums = self._add(sums, place_of(i, part), of_group, i + item)
      return sums, following

    def of_parts(turn: Any) -> list[list[OfGroup]]:
      return [self._of_groups(place_of(turn, part)) for part in parts]

    def place_of(turn: Any, part: int) -> Place:
      if sizes.columns_first:
        return Place(turn, sizes.depth, part)
      return Place(turn * sizes.depth + part)  # In fewer registers.

    span = sizes.rows, sizes.columns
    if sizes.columns_first:
      span = span[::-1]
    sums = [jnp.zeros(span, jnp.float32) for _ in self.matrices]
    of_groups = of_parts(jnp.int32(start))
    sums, _ = lax.fori_loop(start, stop, turn, (sums, of_groups))
    for part in range(0, plan.rest, plan.part):
      place = place_of(jnp.int32(plan.turns), part)
      sums = self._add(sums, place, self._of_groups(place), item, is_last)
    if sizes.columns_first:
      sums = [total.T for total in sums]
    if not plan.shape.has_groups:
      sums = [
        total * operand.scales(of.scale)[None]
        for total, of in zip(sums, of_groups[0], strict=True)
      ]
    return sums

  def _of_groups(self, place: Place) -> list[OfGroup]:
    """Loads what the group of a row has, of each matrix."""
    return [self._of_group(w, place) for w in self.matrices]

  def _of_group(self, w: operand.Operand, place: Place) -> OfGroup:
    at = *self.front, self._group(place), self.columns
    scale = plgpu.load(w.scale.at[at])
    if w.zero is None or self.plan.has_zeros_as_codes:
      return OfGroup(scale)
    return OfGroup(scale, plgpu.load(w.zero.at[at]).astype(jnp.int32))

  def _group(self, place: Place) -> Any:
    size = self.plan.shape.group
    if place.depth % size:
      return lax.div(place.over(1), jnp.int32(size))
    return place.over(size)

  def _add(
    self,
    sums: Sequence[jax.Array],
    place: Place,
    of_groups: Sequence[OfGroup],
    turn: Any,
    is_last: Any = None,
  ) -> list[jax.Array]:
    """Adds the products with some rows of each matrix.

    Args:
      sums: of each, [rows, columns] float32.
      place: of the first of `plan.part` rows.
      of_groups: of these rows.
      turn: a number that changes in each turn of a loop, for
        `unpacking.unpack`.
      is_last: whether to add anything; of the rows, some may be behind the
        matrix. None: all are in it.
    """
    shape = self.plan.shape
    packed = 8 // shape.bits
    kept = pl.ds(place.over(packed), self.plan.part // packed)
    span, axis = (kept, self.columns), 0
    if shape.by_columns:
      span, axis = (self.columns, kept), 1
    codes = [
      self._load(w.values, self.front, *span, is_last, axis=axis)
      for w in self.matrices
    ]
    more: Sequence[jax.Array | None] = [None] * len(codes)
    if self.plan.has_scaled_numbers:
      blocks = shape.group // operand.BLOCK
      groups = lax.div(_indices(kept), operand.HALF * blocks)
      if is_last is not None:
        groups = jnp.minimum(groups, self.matrices[0].scale.shape[-2] - 1)
      more = [self._as_codes(w.scale, groups) for w in self.matrices]
    elif self.plan.has_zeros_as_codes:
      groups = jnp.full(codes[0].shape[0], self._group(place))
      more = [self._as_codes(w.zero, groups) for w in self.matrices]
    products: Sequence[Any] = sums
    if self.plan.has_sums_of_groups:
      products = [None] * len(codes)
    numbers = self._numbers(
      codes, more, place.over(1), of_groups, turn & 1 == 0
    )
    for at, of_each in numbers:
      x = self._load(self.x_ref, (), self.rows, at, is_last, axis=1)
      products = [
        self._dot(x, w) if product is None else product + self._dot(x, w)
        for product, w in zip(products, of_each, strict=True)
      ]
    if not self.plan.has_sums_of_groups:
      return list(products)
    return [
      self._sum(total, product, of.scale)
      for total, product, of in zip(sums, products, of_groups, strict=True)
    ]

  def _as_codes(self, ref: Any, groups: jax.Array) -> jax.Array:
    """Loads what groups have, for each of their codes, as codes lie.

    Args:
      ref: of it.
      groups: [bytes], the group of each.
    """
    at = groups[:, None], _indices(self.columns)[None, :]
    return plgpu.load(ref.at[*self.front, *at])

  def _dot(self, x: jax.Array, numbers: jax.Array) -> jax.Array:
    """Multiplies, in float32, by numbers of a matrix as they lie.

    Of [columns, rows], where columns are first.
    """
    shape = self.plan.shape
    if shape.is_fp8:
      x = self._fp8(x)
    if shape.is_fp8 and not self.interpret:
      return fp8_dot.dot(x, numbers.T)
    operands, transposed = (x, numbers), (False, shape.by_columns)
    if self.plan.sizes.columns_first:
      operands, transposed = (numbers, x), (not shape.by_columns, True)
    product: jax.Array = plgpu.dot(
      *operands,
      *transposed,
      # Float32 isn't rounded to TensorFloat32.
      allow_tf32=False if shape.dtype == 'float32' else None,
    )
    return product

  def _fp8(self, bits: jax.Array) -> jax.Array:
    """Returns numbers of e4m3 that are multiplied as such."""
    if self.interpret:
      return unpacking.decode(bits, jnp.float32)
    return lax.bitcast_convert_type(bits, jnp.float8_e4m3fn)

  def _sum(
    self, total: jax.Array, product: jax.Array, scale: jax.Array
  ) -> jax.Array:
    """Adds a product, times the scales of its group."""
    at = 1 if self.plan.sizes.columns_first else 0
    scale = jnp.expand_dims(operand.scales(scale), at)
    if self.interpret:
      return total + product * scale
    # Triton makes two instructions of it by itself.
    (total,) = plgpu.elementwise_inline_asm(
      'fma.rn.f32 $0, $1, $2, $3;',
      args=[product, jnp.broadcast_to(scale, total.shape), total],
      constraints='=f,f,f,f',
      pack=1,
      result_shape_dtypes=[jax.ShapeDtypeStruct(total.shape, total.dtype)],
    )
    return total

  def _load(
    self,
    ref: Any,
    front: tuple[Any, ...],
    rows: Any,
    columns: Any,
    is_last: Any,
    axis: int,
  ) -> jax.Array:
    """Loads rows and columns of an array, 0 for those behind its end.

    Args:
      ref: of the array.
      front: indices of the axes in front of these.
      rows, columns: indices, or a pl.ds.
      is_last: whether to load; None: all, and nothing is behind the end.
      axis: the one of rows and columns of which some may be.
    """
    if is_last is None and not isinstance(columns, jax.Array):
      return plgpu.load(ref.at[*front, rows, columns])
    rows, columns = (_indices(span) for span in (rows, columns))
    at = rows[:, None], columns[None, :]
    if is_last is None:
      return plgpu.load(ref.at[*front, *at])
    is_in = at[axis] < ref.shape[len(front) + axis]
    mask = jnp.broadcast_to(is_last & is_in, (rows.size, columns.size))
    return plgpu.load(
      ref.at[*front, *at], mask=mask, other=jnp.zeros((), ref.dtype)
    )

  def _numbers(
    self,
    codes: Sequence[jax.Array],
    more: Sequence[jax.Array | None],
    place: Any,
    of_groups: Sequence[OfGroup],
    once: jax.Array,
  ) -> Iterator[tuple[jax.Array, list[jax.Array]]]:
    """Yields rows of the matrices, and the numbers of each, as codes lie."""
    dtype = self.plan.shape.dtype
    how: dict[str, Any] = {'interpret': self.interpret, 'once': once}
    num = codes[0].shape[1 if self.plan.shape.by_columns else 0]
    at = jnp.arange(num, dtype=jnp.int32)
    if self.plan.shape.is_fp8:
      yield place + at, [self._fp8(c) for c in codes]
      return
    if self.plan.shape.bits == 8:
      yield place + at, [unpacking.unpack(c, dtype, **how) for c in codes]
      return
    # Of each block, 16 rows lie together: Triton sees it in these operations.
    rows = lax.div(at, operand.HALF) * operand.BLOCK + lax.rem(at, operand.HALF)
    for high in (False, True):
      yield (
        place + high * operand.HALF + rows,
        [
          nibbles.unpack(
            c, high, self.plan.shape.codes, of.zero, dtype, more=of_code, **how
          )
          for c, of, of_code in zip(codes, of_groups, more, strict=True)
        ],
      )


def _indices(span: Any) -> jax.Array:
  if isinstance(span, jax.Array):
    return span
  return span.start + jnp.arange(span.size, dtype=jnp.int32)
