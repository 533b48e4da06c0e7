# SPDX-License-Identifier: Apache-2.0
"""Fetches keys and values on Ampere, by cp.async, some blocks ahead.

All warpgroups of a block (CTA) fetch, a part of each block of keys and values,
into a ring of buffers in shared memory. Shape letters are those of `api`; W is
the number of items in `plan.Small` or `plan.Chunks`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu
import jax.numpy as jnp

from pallas_kernels import mosaic_copies
from pallas_kernels.ragged_paged_attention import batch as batch_lib
from pallas_kernels.ragged_paged_attention import tuning

plgpu: Any = mosaic_gpu  # JAX 0.10 lacks half of it.


@dataclasses.dataclass(frozen=True, slots=True)
class Spec:
  """What a kernel is compiled for.

  Attributes:
    shape: see `tuning.Shape`.
    tile: rows of the plan's tiles, and the rest of its sizes; four warps are a
      warpgroup.
    options: see `batch.Options`.
    interpret: whether the kernel is interpreted, as there is no GPU.
  """

  shape: tuning.Shape
  tile: tuning.Tile
  options: batch_lib.Options
  interpret: bool

  @property
  def warpgroups(self) -> int:
    """Warpgroups of a block."""
    return self.tile.num_warps // 4

  @property
  def part(self) -> int:
    """Keys of a block that a warpgroup fetches by one copy."""
    return min(self.tile.block_n // self.warpgroups, self.shape.page_size)

  @property
  def parts(self) -> int:
    """Copies of keys, and as many of values, a warpgroup makes for a block."""
    return self.tile.block_n // self.warpgroups // self.part


class Inputs(NamedTuple):
  """Refs in the device's memory; see `batch.Batch`, `plan.Small`, `Chunks`."""

  rows: Any  # [T * H, h], queries, which outputs replace
  k_pages: Any  # [N, K, page_size, h]
  v_pages: Any  # [N, K, page_size, h]
  kv_lens: Any  # [S] int32
  page_indices: Any  # [S, P] int32
  cu_q_lens: Any  # [S + 1] int32
  seq: Any  # [W] int32
  first_row: Any  # [W] int32
  start: Any  # [W] int32
  stop: Any  # [W] int32
  slot: Any  # [W] int32; None if every tile's result is whole
  count: Any  # [1] int32


class Scratch(NamedTuple):
  """Refs in a block's shared memory."""

  k: Any  # [num_stages, block_n, h]
  v: Any  # [num_stages, block_n, h]
  meet: Any = None  # the interpreter's barrier for all warpgroups


class Item(NamedTuple):
  """A tile of the plan, for one KV head, as scalars."""

  seq: jax.Array
  head: jax.Array
  kv_len: jax.Array
  start: jax.Array
  stop: jax.Array


def first_blocks(
  spec: Spec, inputs: Inputs, scratch: Scratch, item: Item
) -> tuple[jax.Array, ...]:
  """Fetches the first blocks; returns the pages of the one after them."""
  for i in range(spec.tile.num_stages - 1):
    j = item.start + i
    fetch(spec, inputs, scratch, item, j, pages(spec, inputs, item, j))
  return pages(spec, inputs, item, item.start + (spec.tile.num_stages - 1))


def pages(
  spec: Spec, inputs: Inputs, item: Item, j: jax.Array
) -> tuple[jax.Array, ...]:
  """Returns the page of each part of block j that this warpgroup fetches.

  After the last page that has tokens there is none: that one is found again.
  """
  page_size = jnp.int32(spec.shape.page_size)
  last = lax.div(item.kv_len - 1, page_size)
  first = _first_key(spec, j)
  return tuple(
    inputs.page_indices[
      item.seq,
      jnp.minimum(lax.div(first + i * spec.part, page_size), last),
    ]
    for i in range(spec.parts)
  )


def _first_key(spec: Spec, j: jax.Array) -> jax.Array:
  """Returns the first key of block j that this warpgroup fetches."""
  first: jax.Array = j * spec.tile.block_n + lax.axis_index('warpgroup') * (
    spec.part * spec.parts
  )
  return first


def fetch(
  spec: Spec,
  inputs: Inputs,
  scratch: Scratch,
  item: Item,
  j: jax.Array,
  pages: tuple[jax.Array, ...],
) -> None:
  """Has this warpgroup's part of block j copied, if there is such a block."""
  slot = lax.rem(j - item.start, jnp.int32(spec.tile.num_stages))
  first = _first_key(spec, j)

  @pl.when(j < item.stop)
  def copy() -> None:
    for i, page in enumerate(pages):
      key = first + i * spec.part
      source = pl.ds(lax.rem(key, jnp.int32(spec.shape.page_size)), spec.part)
      target = pl.ds(key - j * spec.tile.block_n, spec.part)
      for pool, ring in (
        (inputs.k_pages, scratch.k),
        (inputs.v_pages, scratch.v),
      ):
        mosaic_copies.copy(
          pool.at[page, item.head, source],
          ring.at[slot, target],
          spec.interpret,
        )

  if not spec.interpret:
    pl.when(j >= item.stop)(
      functools.partial(mosaic_copies.commit, 2 * spec.parts)
    )


def wait(spec: Spec, scratch: Scratch) -> None:
  """Waits for the oldest block, and for all warpgroups to be here."""
  if not spec.interpret:
    plgpu.wait_gmem_to_smem(2 * spec.parts * (spec.tile.num_stages - 2))
  meet(spec, scratch)


def meet(spec: Spec, scratch: Scratch) -> None:
  """Has all warpgroups of a block wait for each other."""
  mosaic_copies.meet(spec.warpgroups, scratch.meet)
