# SPDX-License-Identifier: Apache-2.0
"""Pallas, lowered to Triton: NVIDIA GPUs from Ampere on. One launch.

A block of the GPU multiplies a tile of rows by some columns of the matrix (see
`plan`). It loads codes, converts each once, and hands them out to its warps as
numbers of x's dtype, through shared memory, where a product of 16 bits has its
matrix, too; so no matrix is put together in memory. Codes are converted without
their scales, exactly. A group's sum is multiplied by its scales, in float32.

Where sums are split, XLA adds them. On CPUs the kernel runs in Pallas's
interpreter, for tests.
"""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
import jax.numpy as jnp

from pallas_kernels import devices
from pallas_kernels import unpacking
from pallas_kernels.quantized_matmul import nibbles
from pallas_kernels.quantized_matmul import operand
from pallas_kernels.quantized_matmul import plan as plan_lib
from pallas_kernels.quantized_matmul import tuning


def quantized_matmul(
  x: jax.Array,
  w: operand.Operand,
  codes: str,
  group: int | None,
  dtype: jax.typing.DTypeLike,
  *,
  sizes: tuning.Sizes | None = None,
) -> jax.Array:
  """Multiplies rows by a matrix in codes; see `api.quantized_matmul`.

  Args:
    x, w, codes, group, dtype: see there.
    sizes: None for those that `tuning` has for the default device.

  Raises:
    NotImplementedError: the kernel can't run there, or not for such shapes.
  """
  shape = tuning.Shape.of(x, w, codes, group)
  plan = plan_lib.of(
    shape,
    sizes or tuning.choose(shape),
    devices.multiprocessors(devices.default()),
  )
  if w.values.dtype == jnp.float8_e4m3fn:  # Ampere knows no such dtype.
    bits = lax.bitcast_convert_type(w.values, jnp.uint8)
    w = w._replace(values=bits)
  kept = jnp.float32 if plan.splits > 1 else dtype
  launch = functools.partial(_launch, plan=plan, dtype=kept)
  sums = devices.launch(launch, x, w)
  return sums.sum(axis=0).astype(dtype) if plan.splits > 1 else sums[0]


def _launch(
  x: jax.Array,
  w: operand.Operand,
  *,
  plan: plan_lib.Plan,
  dtype: jax.typing.DTypeLike,
  interpret: bool,
) -> jax.Array:
  shape, sizes = plan.shape, plan.sizes
  few = '' if shape.num_rows <= tuning.FEW_ROWS else '_many'
  return pl.pallas_call(
    functools.partial(_kernel, plan=plan, interpret=interpret),
    grid=(plan.num_items,),
    out_shape=jax.ShapeDtypeStruct(
      (plan.splits, shape.num_rows, shape.num_out), dtype
    ),
    compiler_params=plgpu.CompilerParams(
      num_warps=sizes.num_warps, num_stages=sizes.num_stages
    ),
    interpret=interpret,
    name=f'quantized_matmul{few}',
  )(x, w)


def _kernel(
  x_ref: Any,
  w: operand.Operand,
  out_ref: Any,
  *,
  plan: plan_lib.Plan,
  interpret: bool,
) -> None:
  """Multiplies a tile of rows by some columns, over a span of what is summed.

  Args:
    x_ref: [T, in].
    w: of refs.
    out_ref: [splits, T, out], the result.
    plan: of the items.
    interpret: whether Pallas interprets the kernel.
  """
  shape, sizes = plan.shape, plan.sizes
  item = pl.program_id(0)
  tiles = plan.row_tiles * plan.column_tiles
  split = item // tiles
  # Tiles that would end behind the matrix begin earlier: they compute and store
  # the same as others, so that neither loads nor stores need a mask.
  first = jnp.minimum(
    item % tiles // plan.row_tiles * sizes.columns,
    shape.num_out - sizes.columns,
  )
  first = pl.multiple_of(first, math.gcd(shape.num_out, sizes.columns))
  columns = pl.ds(first, sizes.columns)
  rows = jnp.minimum(
    item % plan.row_tiles * sizes.rows
    + jnp.arange(sizes.rows, dtype=jnp.int32),
    shape.num_rows - 1,
  )
  tile = _Tile(x_ref, w, plan, rows, columns, interpret)
  parts = [p * plan.part for p in range(sizes.depth // plan.part)]
  start, stop = ((split + end) * plan.turns // plan.splits for end in range(2))

  def turn(i: jax.Array, state: Any) -> Any:
    sums, of_groups = state
    following = of_groups
    if shape.has_groups:  # Loaded a turn ahead: products would wait for them.
      begin = (i + 1) * sizes.depth
      following = [tile.of_group(begin + part) for part in parts]
    for part, of_group in zip(parts, of_groups, strict=True):
      sums = tile.add(sums, i * sizes.depth + part, of_group, i + item)
    return sums, following

  sums = jnp.zeros((sizes.rows, sizes.columns), jnp.float32)
  of_groups = [tile.of_group(start * sizes.depth + part) for part in parts]
  sums, _ = lax.fori_loop(start, stop, turn, (sums, of_groups))
  is_last = split == plan.splits - 1
  for place in range(plan.turns * sizes.depth, shape.num_in, plan.part):
    sums = tile.add(sums, place, tile.of_group(place), item, is_last)
  if not shape.has_groups:
    sums *= operand.scales(of_groups[0].scale)[None]
  at = first + jnp.arange(sizes.columns, dtype=jnp.int32)
  plgpu.store(
    out_ref.at[split, rows[:, None], at[None, :]], sums.astype(out_ref.dtype)
  )


class _OfGroup(NamedTuple):
  """What some columns have for a group of rows.

  Attributes:
    scale: [columns], as it is kept.
    zero: [columns] int32, or None.
  """

  scale: jax.Array
  zero: jax.Array | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class _Tile:
  """What a block multiplies; see `_kernel`.

  Attributes:
    x_ref, w, plan, interpret: see there.
    rows: [rows] int32, of x.
    columns: of the matrix.
  """

  x_ref: Any
  w: operand.Operand
  plan: plan_lib.Plan
  rows: jax.Array
  columns: Any
  interpret: bool

  def of_group(self, place: Any) -> _OfGroup:
    """Loads what the group of a row of the matrix has.

    Rows beyond the matrix are taken for those of the last group.
    """
    groups = self.w.scale.shape[0]
    group = jnp.minimum(place // self.plan.shape.group, groups - 1)
    scale = plgpu.load(self.w.scale.at[group, self.columns])
    if self.w.zero is None:
      return _OfGroup(scale)
    zero = plgpu.load(self.w.zero.at[group, self.columns])
    return _OfGroup(scale, zero.astype(jnp.int32))

  def add(
    self,
    sums: jax.Array,
    place: Any,
    of_group: _OfGroup,
    turn: Any,
    is_last: Any = None,
  ) -> jax.Array:
    """Adds the products with some rows of the matrix.

    Args:
      sums: [rows, columns] float32.
      place: the first of `plan.part` rows.
      of_group: of these rows.
      turn: a number that changes in each turn of a loop, for
        `unpacking.unpack`.
      is_last: whether to add anything; of the rows, some may be behind the
        matrix. None: all are in it.
    """
    shape = self.plan.shape
    packed = 8 // shape.bits
    kept = pl.ds(place // packed, self.plan.part // packed)
    codes = self._load(self.w.values, kept, self.columns, is_last, axis=0)
    dot: Any = plgpu.dot
    if shape.dtype == 'float32':  # It isn't rounded to TensorFloat32.
      dot = functools.partial(dot, allow_tf32=False)
    products = [
      dot(self._load(self.x_ref, self.rows, at, is_last, axis=1), numbers)
      for at, numbers in self._numbers(codes, place, of_group, turn & 1 == 0)
    ]
    product = functools.reduce(jnp.add, products)
    if not shape.has_groups:
      return sums + product
    scale = operand.scales(of_group.scale)[None]
    if self.interpret:
      return sums + product * scale
    # Triton makes two instructions of it by itself.
    (sums,) = plgpu.elementwise_inline_asm(
      'fma.rn.f32 $0, $1, $2, $3;',
      args=[product, jnp.broadcast_to(scale, sums.shape), sums],
      constraints='=f,f,f,f',
      pack=1,
      result_shape_dtypes=[jax.ShapeDtypeStruct(sums.shape, sums.dtype)],
    )
    return sums

  def _load(
    self, ref: Any, rows: Any, columns: Any, is_last: Any, axis: int
  ) -> jax.Array:
    """Loads rows and columns of an array, 0 for those behind its end.

    Args:
      ref: of the array.
      rows, columns: indices, or a pl.ds.
      is_last: whether to load; None: all, and nothing is behind the end.
      axis: the one of which some may be.
    """
    if is_last is None and not isinstance(columns, jax.Array):
      return plgpu.load(ref.at[rows, columns])
    rows, columns = (_indices(span) for span in (rows, columns))
    at = rows[:, None], columns[None, :]
    if is_last is None:
      return plgpu.load(ref.at[at])
    mask = jnp.broadcast_to(
      is_last & (at[axis] < ref.shape[axis]), (rows.size, columns.size)
    )
    return plgpu.load(ref.at[at], mask=mask, other=jnp.zeros((), ref.dtype))

  def _numbers(
    self, codes: jax.Array, place: Any, of_group: _OfGroup, once: jax.Array
  ) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Yields rows of the matrix, and what their codes stand for."""
    dtype = self.plan.shape.dtype
    how: dict[str, Any] = {'interpret': self.interpret, 'once': once}
    at = jnp.arange(codes.shape[0], dtype=jnp.int32)
    if self.plan.shape.bits == 8:
      yield place + at, unpacking.unpack(codes, dtype, **how)
      return
    # Of each block, 16 rows lie together: Triton sees it in these operations.
    rows = lax.div(at, operand.HALF) * operand.BLOCK + lax.rem(at, operand.HALF)
    for high in (False, True):
      yield (
        place + high * operand.HALF + rows,
        nibbles.unpack(
          codes, high, self.plan.shape.codes, of_group.zero, dtype, **how
        ),
      )


def _indices(span: Any) -> jax.Array:
  if isinstance(span, jax.Array):
    return span
  return span.start + jnp.arange(span.size, dtype=jnp.int32)
