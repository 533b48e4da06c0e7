# SPDX-License-Identifier: Apache-2.0
"""The bodies of `pallas_mosaic`'s kernels: wgmma and TMA, or mma and cp.async.

Rows and matrices come, DEPTH numbers of a row at a time, into a ring of buffers
in shared memory, some steps ahead of those that are multiplied. On Hopper a
warpgroup fetches for the others; on Ampere each fetches its own rows, and its
part of the matrices. A ref is a reference to an array in the GPU's memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu
import jax.numpy as jnp

from pallas_kernels import mosaic_copies
from pallas_kernels import mosaic_rows
from pallas_kernels.grouped_matmul import mosaic_sizes
from pallas_kernels.grouped_matmul import tuning

plgpu: Any = mosaic_gpu  # JAX 0.10 lacks half of it.
ROWS, STEP, DEPTH = mosaic_rows.ROWS, mosaic_rows.STEP, mosaic_sizes.DEPTH
ALIGNED = mosaic_sizes.ALIGNED
# Registers of a thread, where two warpgroups multiply: the one that fetches
# lends them its own.
_FETCH_REGISTERS, _COMPUTE_REGISTERS = 24, 240


@dataclasses.dataclass(frozen=True, slots=True)
class Spec:
  """What a kernel is compiled for.

  Attributes:
    shape: see `tuning.Shape`.
    sizes: see `mosaic_sizes.Sizes`.
    combine: see `api.grouped_matmul`.
    has_biases: whether there is one of each kind.
    is_hopper: whether by wgmma and TMA.
    interpret: whether the kernel is interpreted, as there is no GPU.
  """

  shape: tuning.Shape
  sizes: mosaic_sizes.Sizes
  combine: Callable[..., jax.Array]
  has_biases: bool
  is_hopper: bool
  interpret: bool

  @property
  def num_rows(self) -> int:
    """Rows of x, with those that only fill a tile."""
    rows = -(-self.shape.num_rows // ALIGNED) * ALIGNED
    return max(rows, self.sizes.rows)

  @property
  def num_columns(self) -> int:
    """In how many parts each matrix's columns are cut."""
    return self.shape.num_out // self.sizes.columns

  @property
  def num_steps(self) -> int:
    return self.shape.num_in // DEPTH

  @property
  def copies(self) -> int:
    """Copies of a step, by the warpgroup that fetches."""
    rows = self.sizes.warpgroups if self.is_hopper else 1
    return rows + self.shape.num_kinds


class Tile(NamedTuple):
  """What a block does, as scalars."""

  group: jax.Array
  start: jax.Array  # the group's rows
  stop: jax.Array
  first: jax.Array  # of the tile's rows
  columns: Any  # of the matrices


class Refs(NamedTuple):
  """Refs in the device's memory, and in a block's shared memory."""

  x: Any  # [R, in], in the order of the groups
  matrices: Sequence[Any]  # of each kind, [G, in, out]
  biases: Sequence[Any]  # of each kind, [G, out], or none
  out: Any  # [R + 1, out]
  rows: Any  # [num_stages, warpgroups, ROWS, DEPTH]
  rings: Sequence[Any]  # of each kind, [num_stages, DEPTH, columns]
  barriers: Sequence[Any]


def run(spec: Spec, *refs: Any) -> None:
  """Runs a block of the GPU.

  Args:
    spec: what it is compiled for.
    refs: x; of the tiles group, start and stop, [tiles] int32 each; the
      matrices, biases, the result, and what `pallas_mosaic` has as scratch.
  """
  kinds = spec.shape.num_kinds
  x, group, start, stop, *rest = refs
  matrices, rest = rest[:kinds], rest[kinds:]
  num_biases = kinds * spec.has_biases
  biases, (out, rows, *rest) = rest[:num_biases], rest[num_biases:]
  found = Refs(x, matrices, biases, out, rows, rest[:kinds], rest[kinds:])
  block = lax.axis_index('block')
  number = lax.div(block, jnp.int32(spec.num_columns))
  column = lax.rem(block, jnp.int32(spec.num_columns)) * spec.sizes.columns
  tile = Tile(
    group[number],
    start[number],
    stop[number],
    pl.multiple_of(
      jnp.minimum(
        lax.div(start[number], jnp.int32(ALIGNED)) * ALIGNED,
        x.shape[0] - spec.sizes.rows,
      ),
      ALIGNED,
    ),
    pl.ds(column, spec.sizes.columns),
  )

  @pl.when(tile.start < tile.stop)
  def multiply() -> None:
    if spec.is_hopper:
      _on_hopper(spec, found, tile)
    else:
      _on_ampere(spec, found, tile)


def _on_hopper(spec: Spec, refs: Refs, tile: Tile) -> None:
  """Has a warpgroup fetch, and the others multiply."""
  there, free, *_ = refs.barriers
  warpgroup, count = lax.axis_index('warpgroup'), spec.sizes.warpgroups
  stages, steps = spec.sizes.num_stages, spec.num_steps

  def slot_of(step: Any) -> jax.Array:
    return lax.rem(jnp.int32(step), jnp.int32(stages))

  @pl.when(warpgroup == count)
  def fetch() -> None:
    if count > 1:
      plgpu.set_max_registers(_FETCH_REGISTERS, action='decrease')

    @pl.loop(0, steps)
    def fetch_step(step: jax.Array) -> None:
      slot, depth = slot_of(step), pl.ds(step * DEPTH, DEPTH)

      @pl.when(step >= stages)
      def wait() -> None:
        plgpu.barrier_wait(free.at[slot])

      for i in range(count):
        plgpu.copy_gmem_to_smem(
          refs.x.at[pl.ds(tile.first + i * ROWS, ROWS), depth],
          refs.rows.at[slot, i],
          there.at[slot],
        )
      for matrix, ring in zip(refs.matrices, refs.rings, strict=True):
        plgpu.copy_gmem_to_smem(
          matrix.at[tile.group, depth, tile.columns],
          ring.at[slot],
          there.at[slot],
        )

    # Every phase of a barrier must be waited for before the kernel ends.
    for step in range(max(steps - stages, 0), steps):
      plgpu.barrier_wait(free.at[slot_of(step)])

  @pl.when(warpgroup < count)
  def compute() -> None:
    if count > 1:
      plgpu.set_max_registers(_COMPUTE_REGISTERS, action='increase')

    def multiply(*sums: Any) -> list[jax.Array]:
      @pl.loop(0, steps)
      def multiply_step(step: jax.Array) -> None:
        slot = slot_of(step)
        plgpu.barrier_wait(there.at[slot])
        for total, ring in zip(sums, refs.rings, strict=True):
          plgpu.wgmma(total, refs.rows.at[slot, warpgroup], ring.at[slot])
        # All but this step's are done.
        plgpu.wgmma_wait(len(sums))

        @pl.when(step > 0)
        def release() -> None:
          plgpu.barrier_arrive(free.at[slot_of(step - 1)])

      plgpu.wgmma_wait(0)
      plgpu.barrier_arrive(free.at[slot_of(steps - 1)])
      return [total[...] for total in sums]

    shape = ROWS, spec.sizes.columns
    kinds = [plgpu.ACC(shape, jnp.float32)] * spec.shape.num_kinds
    _store(spec, refs, tile, pl.run_scoped(multiply, *kinds))


def _on_ampere(spec: Spec, refs: Refs, tile: Tile) -> None:
  """Has all warpgroups fetch and multiply."""
  warpgroup, count = lax.axis_index('warpgroup'), spec.sizes.warpgroups
  stages, steps = spec.sizes.num_stages, spec.num_steps
  part = DEPTH // count  # of the matrices, that a warpgroup fetches

  def slot_of(step: jax.Array) -> jax.Array:
    return lax.rem(step, jnp.int32(stages))

  def fetch(step: Any) -> None:
    step = jnp.int32(step)
    slot, first = slot_of(step), step * DEPTH

    @pl.when(step < steps)
    def copy() -> None:
      mosaic_copies.copy(
        refs.x.at[
          pl.ds(tile.first + warpgroup * ROWS, ROWS), pl.ds(first, DEPTH)
        ],
        refs.rows.at[slot, warpgroup],
        spec.interpret,
      )
      for matrix, ring in zip(refs.matrices, refs.rings, strict=True):
        mosaic_copies.copy(
          matrix.at[
            tile.group, pl.ds(first + warpgroup * part, part), tile.columns
          ],
          ring.at[slot, pl.ds(warpgroup * part, part)],
          spec.interpret,
        )

    if not spec.interpret:
      pl.when(step >= steps)(
        functools.partial(mosaic_copies.commit, spec.copies)
      )

  def step(i: jax.Array, sums: list[jax.Array]) -> list[jax.Array]:
    if not spec.interpret:
      plgpu.wait_gmem_to_smem(spec.copies * (stages - 2))
    _meet(spec, refs)
    # Into the place of the step before, which all have multiplied by now.
    fetch(i + (stages - 1))
    slot = slot_of(i)
    rows = refs.rows.at[slot, warpgroup]
    return [
      _add_product(spec, total, rows, ring.at[slot])
      for total, ring in zip(sums, refs.rings, strict=True)
    ]

  for i in range(stages - 1):
    fetch(i)
  zeros = plgpu.layout_cast(
    jnp.zeros((ROWS, spec.sizes.columns), jnp.float32), plgpu.Layout.WGMMA
  )
  sums = lax.fori_loop(0, steps, step, [zeros] * spec.shape.num_kinds)
  _store(spec, refs, tile, sums)


def _meet(spec: Spec, refs: Refs) -> None:
  """Has the warpgroups that multiply wait for each other."""
  barrier = refs.barriers[-1] if spec.interpret else None
  mosaic_copies.meet(spec.sizes.warpgroups, barrier)


def _add_product(spec: Spec, total: jax.Array, rows: Any, ring: Any) -> Any:
  """Returns total + rows @ ring, [ROWS, columns] float32.

  Args:
    spec: of the kernel.
    total: the sums.
    rows: [ROWS, DEPTH], a ref.
    ring: [DEPTH, columns], a ref.
  """
  if spec.interpret:
    return total + jnp.dot(
      rows[...], ring[...], preferred_element_type=jnp.float32
    )
  left, right = (
    mosaic_rows.mma_layout(operand, spec.shape.dtype)
    for operand in ('LHS', 'RHS')
  )
  pieces = plgpu.load(rows, layout=left, optimized=False)
  for i in range(0, DEPTH, STEP):
    total = plgpu.mma(
      total,
      pieces[:, i : i + STEP],
      plgpu.load(ring.at[pl.ds(i, STEP)], layout=right, optimized=False),
    )
  return total


def _store(
  spec: Spec, refs: Refs, tile: Tile, sums: Sequence[jax.Array]
) -> None:
  """Combines a warpgroup's sums, and stores the rows that are the group's.

  Args:
    spec, refs, tile: of the block.
    sums: of each kind, [ROWS, columns] float32.
  """
  if refs.biases:
    sums = [
      total
      + lax.broadcast_in_dim(
        plgpu.load(
          bias.at[tile.group, tile.columns],
          layout=plgpu.Layout.WGMMA.reduce(0),
          optimized=False,
        ).astype(jnp.float32),
        total.shape,
        [1],
      )
      for total, bias in zip(sums, refs.biases, strict=True)
    ]
  out = spec.combine(*sums).astype(spec.shape.dtype)
  warpgroup = lax.axis_index('warpgroup')
  row = mosaic_rows.row_numbers() + (tile.first + warpgroup * ROWS)
  is_mine = (row >= tile.start) & (row < tile.stop)
  place = jnp.where(is_mine, row, refs.out.shape[0] - 1)

  def store() -> None:
    mosaic_rows.store_rows(
      refs.out.at[:, tile.columns], place, out, spec.interpret
    )

  if not spec.interpret:
    store()
    return
  for i in range(spec.sizes.warpgroups):  # It stores all rows, in turn.
    pl.when(warpgroup == i)(store)
    _meet(spec, refs)
