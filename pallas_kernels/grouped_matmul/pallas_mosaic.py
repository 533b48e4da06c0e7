# SPDX-License-Identifier: Apache-2.0
"""Pallas, lowered to Mosaic: Hopper from JAX 0.11 on, Ampere from 0.12 on.

A block (CTA) takes a tile of rows, which are of one group, and some columns of
each kind of that group's matrices. XLA brings rows into the order of their
groups before, as copies to shared memory take what lies together, and finds the
tiles: for each one, its group and its rows.

A tile is always of as many rows, and begins at a multiple of 8, before or with
the group's; the last ones begin so that none is beyond the end. Rows that are
not the group's are computed, and stored behind all that are anybody's.

On CPUs it runs in Mosaic's interpreter, for tests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu
import jax.numpy as jnp

from pallas_kernels import devices
from pallas_kernels import mosaic_devices
from pallas_kernels import mosaic_rows
from pallas_kernels.grouped_matmul import coded
from pallas_kernels.grouped_matmul import mosaic_kernels
from pallas_kernels.grouped_matmul import mosaic_sizes
from pallas_kernels.grouped_matmul import plan as plan_lib
from pallas_kernels.grouped_matmul import tuning

plgpu: Any = mosaic_gpu  # JAX 0.10 lacks half of it.


def grouped_matmul(
  x: jax.Array,
  matrices: tuple[jax.Array, ...],
  group_sizes: jax.Array,
  rows: jax.Array,
  combine: Callable[..., jax.Array],
  matmul: Any = None,
  biases: tuple[jax.Array, ...] = (),
  *,
  sizes: mosaic_sizes.Sizes | None = None,
) -> jax.Array:
  """Multiplies each row by its group's matrix; see `api.grouped_matmul`.

  Args:
    x, matrices, group_sizes, rows, combine, biases: see there.
    matmul: not used, but that codes are refused.
    sizes: None for those that `mosaic_sizes` has for the default device.

  Raises:
    NotImplementedError: the kernel can't run there, or not for such shapes.
  """
  if matmul is not None and isinstance(matmul, coded.Coded):
    raise NotImplementedError('pallas_mosaic: matrices: must not be in codes.')
  shape = tuning.Shape.of(x, matrices, rows)
  sizes = sizes or mosaic_sizes.choose(shape)
  spec = mosaic_kernels.Spec(
    shape,
    sizes,
    combine,
    has_biases=bool(biases),
    is_hopper=mosaic_devices.capability() == mosaic_devices.HOPPER,
    interpret=devices.default().platform == 'cpu',
  )
  (num_rows,) = rows.shape
  rows = jnp.pad(rows, (0, spec.num_rows - num_rows))
  tiles = _tiles(group_sizes, num_rows, sizes.most_of_group)
  out = _kernel(spec)(x[rows], *tiles, *matrices, *biases)
  return out[:num_rows]


def _tiles(
  group_sizes: jax.Array, num_rows: int, tile_rows: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns each tile's group, first row, and row after its last one.

  Those that nobody needs come last, and have no rows.
  """
  num = plan_lib.most_tiles(num_rows, len(group_sizes), tile_rows)
  items = jax.vmap(
    lambda i: plan_lib.item_of(i, group_sizes, tile_rows, num_columns=1)
  )(jnp.arange(num, dtype=jnp.int32))
  # Of those without rows, no group that is not there.
  group = jnp.minimum(items.group, len(group_sizes) - 1)
  return group, items.start, items.stop


def _kernel(spec: mosaic_kernels.Spec) -> Callable[..., Any]:
  """Returns the kernel; its arguments are those of `mosaic_kernels.Inputs`."""
  shape, sizes = spec.shape, spec.sizes
  dtype, stages = jnp.dtype(shape.dtype), sizes.num_stages
  tiled: Any = dict(
    transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
  )
  rows_ring = stages, sizes.warpgroups, mosaic_rows.ROWS, mosaic_sizes.DEPTH
  ring = stages, mosaic_sizes.DEPTH, sizes.columns
  scratch: list[Any] = [
    plgpu.SMEM(rows_ring, dtype, **tiled),
    *[plgpu.SMEM(ring, dtype, **tiled) for _ in range(shape.num_kinds)],
  ]
  if spec.is_hopper:
    scratch += [
      plgpu.Barrier(num_arrivals=spec.copies, num_barriers=stages),
      plgpu.Barrier(num_arrivals=sizes.warpgroups, num_barriers=stages),
    ]
  if spec.interpret:
    scratch.append(plgpu.Barrier(num_arrivals=sizes.warpgroups))

  def grouped_matmul(*refs: Any) -> None:
    mosaic_kernels.run(spec, *refs)

  tiles = plan_lib.most_tiles(
    shape.num_rows, shape.num_groups, sizes.most_of_group
  )
  kernel: Callable[..., Any] = plgpu.kernel(
    grouped_matmul,
    out_type=jax.ShapeDtypeStruct((spec.num_rows + 1, shape.num_out), dtype),
    grid=(tiles * spec.num_columns,),
    grid_names=('block',),
    num_threads=sizes.warpgroups + spec.is_hopper,
    thread_name='warpgroup',
    scratch_types=scratch,
    compiler_params=plgpu.CompilerParams(approx_math=True),
    interpret=plgpu.InterpretGPUParams() if spec.interpret else None,
  )
  return kernel
