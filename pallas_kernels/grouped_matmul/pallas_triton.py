# SPDX-License-Identifier: Apache-2.0
"""Pallas, lowered to Triton: NVIDIA GPUs from Ampere on. One launch.

A block of the GPU takes a tile of rows, which are of one group (see `plan`),
and some columns of each kind of that group's matrices. Blocks that share both
group and columns follow one another, so that all but one read these from the
cache. Where tokens are few, a tile has room for all rows of a group, and
nothing is read twice. Rows are taken from where they lie, by their indices.

On CPUs it runs in Pallas's interpreter, for tests.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
import jax.numpy as jnp

from pallas_kernels import devices
from pallas_kernels.grouped_matmul import plan as plan_lib
from pallas_kernels.grouped_matmul import tuning


def grouped_matmul(
  x: jax.Array,
  matrices: tuple[jax.Array, ...],
  group_sizes: jax.Array,
  rows: jax.Array,
  combine: Callable[..., jax.Array],
  matmul: Any = None,
  biases: tuple[jax.Array, ...] = (),
  *,
  sizes: tuning.Sizes | None = None,
) -> jax.Array:
  """Multiplies each row by its group's matrix; see `api.grouped_matmul`.

  Args:
    x, matrices, group_sizes, rows, combine, biases: see there.
    matmul: not used.
    sizes: None for those that `tuning` has for the default device.

  Raises:
    NotImplementedError: the kernel can't run there, or not for such shapes.
  """
  del matmul
  shape = tuning.Shape.of(x, matrices, rows)
  sizes = (sizes or tuning.choose(shape)).for_shape(shape)
  launch = functools.partial(_launch, combine=combine, sizes=sizes, shape=shape)
  # Vectors have lengths that are powers of two.
  more = (1 << (shape.num_groups - 1).bit_length()) - shape.num_groups
  return devices.launch(
    launch, x, rows, jnp.pad(group_sizes, (0, more)), matrices, biases
  )


def _launch(
  x: jax.Array,
  rows: jax.Array,
  group_sizes: jax.Array,
  matrices: tuple[jax.Array, ...],
  biases: tuple[jax.Array, ...],
  *,
  combine: Callable[..., jax.Array],
  sizes: tuning.Sizes,
  shape: tuning.Shape,
  interpret: bool,
) -> jax.Array:
  num_tiles = plan_lib.most_tiles(shape.num_rows, shape.num_groups, sizes.rows)
  return pl.pallas_call(
    functools.partial(_kernel, combine=combine, sizes=sizes),
    grid=(num_tiles * (shape.num_out // sizes.columns),),
    out_shape=jax.ShapeDtypeStruct((shape.num_rows, shape.num_out), x.dtype),
    compiler_params=plgpu.CompilerParams(
      num_warps=sizes.num_warps, num_stages=sizes.num_stages
    ),
    interpret=interpret,
    name='grouped_matmul',
  )(x, rows, group_sizes, matrices, biases)


def _kernel(
  x_ref: Any,
  rows_ref: Any,
  sizes_ref: Any,
  matrices: tuple[Any, ...],
  biases: tuple[Any, ...],
  out_ref: Any,
  *,
  combine: Callable[..., jax.Array],
  sizes: tuning.Sizes,
) -> None:
  """Multiplies a tile of rows by some columns.

  Args:
    x_ref: [T, in].
    rows_ref: [R] int32.
    sizes_ref: [G] int32 of the groups, and zeros up to a power of two.
    matrices: [G, in, out] of each kind.
    biases: [G, out] of each kind, or none.
    out_ref: [R, out], the result.
    combine: see `api.grouped_matmul`.
    sizes: of the tile; all divide what they cut.
  """
  num_in, num_out = matrices[0].shape[1:]
  group, start, stop, column = plan_lib.item_of(
    pl.program_id(0), sizes_ref[...], sizes.rows, num_out // sizes.columns
  )
  first = column * sizes.columns
  columns = pl.ds(first, sizes.columns)
  dot: Any = plgpu.dot
  if x_ref.dtype == jnp.float32:  # It isn't rounded to TensorFloat32.
    dot = functools.partial(dot, allow_tf32=False)

  @pl.when(start < stop)
  def multiply() -> None:
    # Rows beyond the tile's repeat its last one: they compute and store the
    # same, so that neither loads nor stores need a mask.
    places = jnp.minimum(
      start + jnp.arange(sizes.rows, dtype=jnp.int32), stop - 1
    )
    rows = plgpu.load(rows_ref.at[places])

    def add(i: jax.Array, sums: Any) -> Any:
      depth = i * sizes.depth + jnp.arange(sizes.depth, dtype=jnp.int32)
      x = plgpu.load(x_ref.at[rows[:, None], depth[None, :]])
      return [
        total
        + dot(
          x,
          plgpu.load(
            matrix.at[group, pl.ds(i * sizes.depth, sizes.depth), columns]
          ),
        )
        for total, matrix in zip(sums, matrices, strict=True)
      ]

    zeros = jnp.zeros((sizes.rows, sizes.columns), jnp.float32)
    sums = lax.fori_loop(0, num_in // sizes.depth, add, [zeros] * len(matrices))
    if biases:
      sums = [
        total + plgpu.load(bias.at[group, columns]).astype(jnp.float32)[None]
        for total, bias in zip(sums, biases, strict=True)
      ]
    out = combine(*sums).astype(out_ref.dtype)
    at = first + jnp.arange(sizes.columns, dtype=jnp.int32)
    plgpu.store(out_ref.at[places[:, None], at[None, :]], out)
