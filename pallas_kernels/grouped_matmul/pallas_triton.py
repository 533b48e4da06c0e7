# SPDX-License-Identifier: Apache-2.0
"""Pallas, lowered to Triton: NVIDIA GPUs from Ampere on. One launch.

A block of the GPU takes a tile of rows, which are of one group (see `plan`),
and some columns of each kind of that group's matrices. Blocks that share both
group and columns follow one another, so that all but one read these from the
cache. Where tokens are few, a tile has room for all rows of a group, and
nothing is read twice. One that has few rows computes few: the kernel has a loop
for each number of them that it may multiply at once. Rows are taken from where
they lie, by their indices. Codes are multiplied as `quantized_matmul`'s kernel
does it, by its tile.

On CPUs it runs in Pallas's interpreter, for tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
import jax.numpy as jnp

from pallas_kernels import devices
from pallas_kernels.grouped_matmul import coded
from pallas_kernels.grouped_matmul import plan as plan_lib
from pallas_kernels.grouped_matmul import tuning
from pallas_kernels.quantized_matmul import plan as quantized_plan
from pallas_kernels.quantized_matmul import rows as rounding
from pallas_kernels.quantized_matmul import tile as tile_lib
from pallas_kernels.quantized_matmul import tuning as quantized_tuning


@dataclasses.dataclass(frozen=True, slots=True)
class Arrays:
  """Multiplies by arrays [G, in, out], whose sizes tiles divide.

  Attributes:
    sizes: of a block.
  """

  sizes: tuning.Sizes

  @property
  def name(self) -> str:
    """The kernel's."""
    return 'grouped_matmul'

  @property
  def ways(self) -> tuning.Ways:
    """Those of multiplying a tile; see `tuning.Sizes`."""
    return self.sizes.ways

  def products(
    self,
    x_ref: Any,
    matrices: Sequence[Any],
    group: jax.Array,
    parts: Sequence[jax.Array],
    columns: Any,
    interpret: bool,
  ) -> Sequence[Sequence[jax.Array]]:
    """Returns each part's products with each kind, [rows, columns] float32.

    Args:
      x_ref: [T, in].
      matrices: of each kind, refs with G in front.
      group: which of these.
      parts: rows of x, [rows] int32 of each part.
      columns: a pl.ds.
      interpret: whether Pallas interprets the kernel.
    """
    del interpret
    sizes = self.sizes
    dot: Any = plgpu.dot
    if x_ref.dtype == jnp.float32:  # It isn't rounded to TensorFloat32.
      dot = functools.partial(dot, allow_tf32=False)

    def add(i: jax.Array, sums: Any) -> Any:
      depth = pl.ds(i * sizes.depth, sizes.depth)
      at = i * sizes.depth + jnp.arange(sizes.depth, dtype=jnp.int32)
      loaded = [plgpu.load(w.at[group, depth, columns]) for w in matrices]
      added = []
      for rows, totals in zip(parts, sums, strict=True):
        x = plgpu.load(x_ref.at[rows[:, None], at[None, :]])
        added.append(
          [total + dot(x, w) for total, w in zip(totals, loaded, strict=True)]
        )
      return added

    zeros = [
      [jnp.zeros((rows.size, sizes.columns), jnp.float32)] * len(matrices)
      for rows in parts
    ]
    turns = x_ref.shape[1] // sizes.depth
    sums: list[list[jax.Array]] = lax.fori_loop(0, turns, add, zeros)
    return sums


@dataclasses.dataclass(frozen=True, slots=True)
class Codes:
  """Multiplies by codes, `quantized_matmul.Operand`s with G in front.

  Attributes:
    plan: how a block multiplies.
  """

  plan: quantized_plan.Plan

  @property
  def name(self) -> str:
    """The kernel's."""
    return 'grouped_matmul_codes'

  @property
  def ways(self) -> tuning.Ways:
    """One alone: codes are converted for all rows, be they few or many."""
    return ((self.sizes.rows,),)

  @property
  def sizes(self) -> quantized_tuning.Sizes:
    """Those of a block."""
    return self.plan.sizes

  @property
  def dtype(self) -> str:
    """That of the rows that a block multiplies."""
    return self.plan.shape.dtype

  def products(
    self,
    x_ref: Any,
    matrices: Sequence[Any],
    group: jax.Array,
    parts: Sequence[jax.Array],
    columns: Any,
    interpret: bool,
  ) -> Sequence[Sequence[jax.Array]]:
    """Returns the products; see `Arrays`."""
    (rows,) = parts
    tile = tile_lib.Tile(
      x_ref, matrices, self.plan, rows, columns, interpret, (group,)
    )
    return [tile.products(0, self.plan.turns, pl.program_id(0), True)]


def grouped_matmul(
  x: jax.Array,
  matrices: tuple[Any, ...],
  group_sizes: jax.Array,
  rows: jax.Array,
  combine: Callable[..., jax.Array],
  matmul: Any = None,
  biases: tuple[jax.Array, ...] = (),
  *,
  multiplier: Arrays | Codes | None = None,
) -> jax.Array:
  """Multiplies each row by its group's matrix; see `api.grouped_matmul`.

  Args:
    x, matrices, group_sizes, rows, combine, biases: see there.
    matmul: `Coded`, where matrices are.
    multiplier: None for what `tuning` has for the default device.

  Raises:
    NotImplementedError: the kernel can't run there, or not for such shapes.
  """
  shape, dtype, scale = tuning.Shape.of(x, matrices, rows), x.dtype, None
  if isinstance(matmul, coded.Coded):
    multiplier = multiplier or Codes(tuning.choose_coded(shape, matmul))
    assert isinstance(multiplier, Codes)
    if matmul.activations is not None:
      x, scale = rounding.rounded(x)
      x = x.astype(multiplier.dtype)  # Which holds them exactly.
    x, matrices = jax.tree.map(tile_lib.readable, (x, tuple(matrices)))
  multiplier = multiplier or Arrays(tuning.choose(shape).for_shape(shape))
  launch = functools.partial(
    _launch, combine=combine, multiplier=multiplier, shape=shape, dtype=dtype
  )
  # Vectors have lengths that are powers of two.
  more = (1 << (shape.num_groups - 1).bit_length()) - shape.num_groups
  return devices.launch(
    launch, x, rows, jnp.pad(group_sizes, (0, more)), matrices, biases, scale
  )


def _launch(
  x: jax.Array,
  rows: jax.Array,
  group_sizes: jax.Array,
  matrices: tuple[Any, ...],
  biases: tuple[jax.Array, ...],
  scale: jax.Array | None,
  *,
  combine: Callable[..., jax.Array],
  multiplier: Arrays | Codes,
  shape: tuning.Shape,
  dtype: jax.typing.DTypeLike,
  interpret: bool,
) -> jax.Array:
  sizes = multiplier.sizes
  num_tiles = plan_lib.most_tiles(shape.num_rows, shape.num_groups, sizes.rows)
  return pl.pallas_call(
    functools.partial(
      _kernel, combine=combine, multiplier=multiplier, interpret=interpret
    ),
    grid=(num_tiles * -(-shape.num_out // sizes.columns),),
    out_shape=jax.ShapeDtypeStruct((shape.num_rows, shape.num_out), dtype),
    compiler_params=plgpu.CompilerParams(
      num_warps=sizes.num_warps, num_stages=sizes.num_stages
    ),
    interpret=interpret,
    name=multiplier.name,
  )(x, rows, group_sizes, matrices, biases, scale)


def _kernel(
  x_ref: Any,
  rows_ref: Any,
  sizes_ref: Any,
  matrices: tuple[Any, ...],
  biases: tuple[Any, ...],
  scale_ref: Any,
  out_ref: Any,
  *,
  combine: Callable[..., jax.Array],
  multiplier: Arrays | Codes,
  interpret: bool,
) -> None:
  """Multiplies a tile of rows by some columns.

  Args:
    x_ref: [T, in].
    rows_ref: [R] int32.
    sizes_ref: [G] int32 of the groups, and zeros up to a power of two.
    matrices: of each kind, with G in front.
    biases: [G, out] of each kind, or none.
    scale_ref: [T, 1] float32 that products of rows are multiplied by, or None.
    out_ref: [R, out], the result.
    combine: see `api.grouped_matmul`.
    multiplier: by which the tile is multiplied.
    interpret: whether Pallas interprets the kernel.
  """
  sizes, num_out = multiplier.sizes, out_ref.shape[1]
  group, start, stop, column = plan_lib.item_of(
    pl.program_id(0), sizes_ref[...], sizes.rows, -(-num_out // sizes.columns)
  )
  first = column * sizes.columns
  if num_out % sizes.columns:
    # Columns that would end behind the matrix begin earlier: they are computed
    # and stored twice, the same, so that neither loads nor stores need a mask.
    first = jnp.minimum(first, num_out - sizes.columns)
    first = pl.multiple_of(first, math.gcd(num_out, sizes.columns))
  columns = pl.ds(first, sizes.columns)
  at = first + jnp.arange(sizes.columns, dtype=jnp.int32)

  def store(places: jax.Array, rows: jax.Array, sums: Any) -> None:
    if scale_ref is not None:
      scale = plgpu.load(scale_ref.at[rows, 0])[:, None]
      sums = [total * scale for total in sums]
    if biases:
      sums = [
        total + plgpu.load(bias.at[group, columns]).astype(jnp.float32)[None]
        for total, bias in zip(sums, biases, strict=True)
      ]
    out = combine(*sums).astype(out_ref.dtype)
    plgpu.store(out_ref.at[places[:, None], at[None, :]], out)

  def multiply(way: Sequence[int]) -> None:
    ends = itertools.accumulate(way)
    # Rows beyond the tile's repeat its last one: they compute and store the
    # same.
    places = [
      jnp.minimum(start + jnp.arange(end - num, end, dtype=jnp.int32), stop - 1)
      for num, end in zip(way, ends, strict=True)
    ]
    parts = [plgpu.load(rows_ref.at[some]) for some in places]
    sums = multiplier.products(
      x_ref, matrices, group, parts, columns, interpret
    )
    for one in zip(places, parts, sums, strict=True):
      store(*one)

  num, fewer = stop - start, 0
  for way in multiplier.ways:
    is_it = (fewer < num) & (num <= sum(way))
    pl.when(is_it)(functools.partial(multiply, way))
    fewer = sum(way)
