# SPDX-License-Identifier: Apache-2.0
"""Pallas, lowered to Triton: NVIDIA GPUs from Ampere on. One launch.

A block of the GPU multiplies a tile of rows by some columns of the matrix (see
`plan` and `tile`).

Where sums are split, XLA adds them. On CPUs the kernel runs in Pallas's
interpreter, for tests.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
import jax.numpy as jnp

from pallas_kernels import devices
from pallas_kernels.quantized_matmul import operand
from pallas_kernels.quantized_matmul import plan as plan_lib
from pallas_kernels.quantized_matmul import tile as tile_lib
from pallas_kernels.quantized_matmul import tuning


def quantized_matmul(
  x: jax.Array,
  w: operand.Operand,
  codes: str,
  group: int | None,
  dtype: jax.typing.DTypeLike,
  *,
  by_columns: bool = False,
  scale: jax.Array | None = None,
  sizes: tuning.Sizes | None = None,
) -> jax.Array:
  """Multiplies rows by a matrix in codes; see `api.quantized_matmul`.

  Args:
    x, w, codes, group, dtype, by_columns: see there. x may be of float8_e4m3fn,
      too: it is multiplied as such on Hopper, if codes lie by columns and rows
      are many. (Few wait for the matrix.)
    scale: [T, 1] float32 that rows of the product are multiplied by, or None.
    sizes: None for those that `tuning` has for the default device.

  Raises:
    NotImplementedError: the kernel can't run there, or not for such shapes.
  """
  if x.dtype == tuning.FP8 and not tuning.takes_fp8(len(x), by_columns):
    x = x.astype(jnp.bfloat16)  # Which holds it exactly.
  shape = tuning.Shape.of(x, w, codes, group, by_columns)
  plan = plan_lib.of(
    shape,
    sizes or tuning.choose(shape),
    devices.multiprocessors(devices.default()),
  )
  x, w = jax.tree.map(tile_lib.readable, (x, w))
  if plan.splits == 1:
    launch = functools.partial(_launch, plan=plan, dtype=dtype)
    return devices.launch(launch, x, w, scale)[0]
  launch = functools.partial(_launch, plan=plan, dtype=jnp.float32)
  sums = devices.launch(launch, x, w, None).sum(axis=0)
  return (sums if scale is None else sums * scale).astype(dtype)


def _launch(
  x: jax.Array,
  w: operand.Operand,
  scale: jax.Array | None,
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
  )(x, w, scale)


def _kernel(
  x_ref: Any,
  w: operand.Operand,
  scale_ref: Any,
  out_ref: Any,
  *,
  plan: plan_lib.Plan,
  interpret: bool,
) -> None:
  """Multiplies a tile of rows by some columns, over a span of what is summed.

  Args:
    x_ref: [T, in].
    w: of refs.
    scale_ref: [T, 1] that rows of the product are multiplied by, or None.
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
  tile = tile_lib.Tile(x_ref, [w], plan, rows, columns, interpret)
  start, stop = ((split + end) * plan.turns // plan.splits for end in range(2))
  (sums,) = tile.products(start, stop, item, split == plan.splits - 1)
  if scale_ref is not None:
    sums *= plgpu.load(scale_ref.at[rows, 0])[:, None]
  at = first + jnp.arange(sizes.columns, dtype=jnp.int32)
  plgpu.store(
    out_ref.at[split, rows[:, None], at[None, :]], sums.astype(out_ref.dtype)
  )
