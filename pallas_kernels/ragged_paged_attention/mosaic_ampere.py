# SPDX-License-Identifier: Apache-2.0
"""The body of `pallas_mosaic`'s kernels for Ampere: cp.async and mma.

A block (CTA) takes tiles of a plan in turn, each for one KV head. Its
warpgroups have 64 rows each, as (query, head of a group) pairs; rows that a
tile lacks repeat its last one: they compute and store the same, so that no
load and no store needs a mask. All warpgroups fetch, a part of each block of
keys and values, into a ring of buffers, some blocks ahead of the one that they
multiply. Queries stay in registers, and so do weights between the products.

A ref is a reference to an array in the GPU's memory. Shape letters are those
of `api`; W is the number of items in `plan.Small` or `plan.Chunks`.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu
import jax.numpy as jnp

from pallas_kernels import mosaic_rows
from pallas_kernels.ragged_paged_attention import mosaic_fetch as fetching
from pallas_kernels.ragged_paged_attention import mosaic_registers as registers

plgpu: Any = mosaic_gpu  # JAX 0.10 lacks half of it.
ROWS = mosaic_rows.ROWS
_SWIZZLED = 64  # channels of shared memory whose places are exchanged


class Partials(NamedTuple):
  """Refs to partial results; R is the rows of a tile."""

  acc: Any  # [W * K * R, h] float32, sums of weighted values
  top: Any  # [W * K * R] float32, the highest scores, times log2(e)
  norm: Any  # [W * K * R] float32, sums of weights


def attend(
  spec: fetching.Spec,
  inputs: fetching.Inputs,
  partials: Partials | None,
  scratch: fetching.Scratch,
) -> None:
  """Does this block's part of the items."""
  kv_heads = jnp.int32(spec.shape.num_kv_heads)

  def turn(work: jax.Array) -> None:
    item, head = lax.div(work, kv_heads), lax.rem(work, kv_heads)
    _tile(spec, inputs, partials, scratch, item, head)

  take_turns(inputs.count[0] * kv_heads, spec.tile.num_blocks, turn)


def take_turns(
  num_items: jax.Array, num_blocks: int, do: Callable[[jax.Array], None]
) -> None:
  """Does this block's part of items: every so-many-th."""
  block = lax.axis_index('block')

  @pl.loop(0, lax.div(num_items - block + (num_blocks - 1), num_blocks))
  def turn(i: jax.Array) -> None:
    do(i * num_blocks + block)


def places(
  spec: fetching.Spec,
  cu_q_lens: Any,
  seq: jax.Array,
  first_row: jax.Array,
  head: jax.Array,
  mine: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Returns each row's place in `Inputs.rows`, and query; [ROWS] int32 each.

  Args:
    spec: of the kernel.
    cu_q_lens: [S + 1] int32, a ref.
    seq: the sequence.
    first_row: of the tile, in the sequence's rows.
    head: the KV head.
    mine: [ROWS] int32, each row's in the tile.
  """
  group = spec.shape.group
  begin, end = cu_q_lens[seq], cu_q_lens[seq + 1]
  row = jnp.minimum(mine + first_row, (end - begin) * group - 1)
  query = lax.div(row, jnp.full_like(row, group)) if group > 1 else row
  heads = spec.shape.num_kv_heads * group
  place = (query + begin) * heads + (row - query * group) + head * group
  return place, query


def _tile(
  spec: fetching.Spec,
  inputs: fetching.Inputs,
  partials: Partials | None,
  scratch: fetching.Scratch,
  number: jax.Array,
  head: jax.Array,
) -> None:
  """Does one item of the plan, and stores its result."""
  group, block_n = spec.shape.group, spec.tile.block_n
  seq, first_row = inputs.seq[number], inputs.first_row[number]
  item = fetching.Item(
    seq, head, inputs.kv_lens[seq], inputs.start[number], inputs.stop[number]
  )
  begin, end = inputs.cu_q_lens[seq], inputs.cu_q_lens[seq + 1]
  past = item.kv_len - (end - begin)
  mine = jnp.minimum(
    mosaic_rows.row_numbers() + lax.axis_index('warpgroup') * ROWS,
    spec.tile.rows - 1,
  )
  place, query = places(spec, inputs.cu_q_lens, seq, first_row, head, mine)
  queries = [
    mosaic_rows.load_rows(
      inputs.rows.at[:, pl.ds(i, _SWIZZLED)],
      place,
      spec.interpret,
      mosaic_rows.mma_layout('LHS', spec.shape.dtype),
    )
    for i in range(0, spec.shape.head_dim, _SWIZZLED)
  ]

  # The blocks that all rows see entirely need no mask.
  first_query = lax.div(first_row, jnp.int32(group))
  stop = jnp.clip(
    lax.div(past + first_query + 1, jnp.int32(block_n)), item.start, item.stop
  )
  start = item.start
  if (window := spec.options.sliding_window) is not None:
    last_query = lax.div(first_row + spec.tile.rows - 1, jnp.int32(group))
    oldest = jnp.maximum(past + last_query + 1 - window, 0)
    start = jnp.clip(
      lax.div(oldest + (block_n - 1), jnp.int32(block_n)), start, stop
    )
  step = functools.partial(
    _key_block, spec, inputs, scratch, item, queries, query + past
  )
  state: Any = (
    registers.start(spec.shape.head_dim),
    fetching.first_blocks(spec, inputs, scratch, item),
  )
  if window is not None:
    state = lax.fori_loop(
      item.start, start, functools.partial(step, True), state
    )
  state = lax.fori_loop(start, stop, functools.partial(step, False), state)
  state, _ = lax.fori_loop(
    stop, item.stop, functools.partial(step, True), state
  )
  # The next tile's keys take the place of those that others still multiply.
  fetching.meet(spec, scratch)
  _store(spec, inputs, partials, scratch, number, head, place, mine, state)


def _store(
  spec: fetching.Spec,
  inputs: fetching.Inputs,
  partials: Partials | None,
  scratch: fetching.Scratch,
  number: jax.Array,
  head: jax.Array,
  place: jax.Array,
  mine: jax.Array,
  state: registers.State,
) -> None:
  """Stores an item's result, whole or partial.

  Args:
    spec, inputs, partials, scratch: of the kernel.
    number: the item's.
    head: the KV head.
    place: [ROWS] int32, each row's in `inputs.rows`.
    mine: [ROWS] int32, each row's in the tile.
    state: what the rows have come to.
  """
  acc, top, norm = state
  shape: Any = acc.shape

  def store_result() -> None:
    out = acc * mosaic_rows.along_rows(1 / norm, shape)
    mosaic_rows.store_rows(
      inputs.rows, place, out.astype(spec.shape.dtype), spec.interpret
    )

  if partials is None:
    for i in range(spec.warpgroups if spec.interpret else 0):
      pl.when(lax.axis_index('warpgroup') == i)(store_result)
      fetching.meet(spec, scratch)
    if not spec.interpret:
      store_result()
    return
  slot = inputs.slot[number]
  pl.when(slot < 0)(store_result)

  @pl.when(slot >= 0)
  def store_partial() -> None:
    to = (slot * spec.shape.num_kv_heads + head) * spec.tile.rows + mine
    for ref, value in (
      (partials.acc, acc),
      (partials.top, top * registers.factor(spec.options)),
      (partials.norm, norm),
    ):
      mosaic_rows.store_rows(ref, to, value, spec.interpret)


def _key_block(
  spec: fetching.Spec,
  inputs: fetching.Inputs,
  scratch: fetching.Scratch,
  item: fetching.Item,
  queries: list[jax.Array],
  positions: jax.Array,
  masked: bool,
  j: jax.Array,
  carried: tuple[registers.State, tuple[jax.Array, ...]],
) -> tuple[registers.State, tuple[jax.Array, ...]]:
  """Multiplies by a block of keys and values, and fetches one ahead.

  Args:
    spec, inputs, scratch, item: see `_tile`.
    queries: [ROWS, h], in pieces of channels.
    positions: [ROWS] int32, each row's in its sequence.
    masked: whether some row does not see all of the block.
    j: number of the block of keys in the sequence.
    carried: the state of the softmax, and the pages of the next block to fetch.

  Returns:
    What is carried to the next block.
  """
  (acc, top, norm), pages = carried
  stages, block_n = spec.tile.num_stages, spec.tile.block_n
  slot = lax.rem(j - item.start, jnp.int32(stages))
  fetching.wait(spec, scratch)
  # Into the place of the block before, which all have multiplied by now.
  ahead = j + (stages - 1)
  fetching.fetch(spec, inputs, scratch, item, ahead, pages)
  pages = fetching.pages(spec, inputs, item, ahead + 1)
  scores = _scores(spec, queries, scratch.k.at[slot])
  last = positions - j * block_n if masked else None
  weights, decay, top = registers.weigh(spec.options, scores, top, last)
  norm = norm * decay + weights.sum(axis=1)
  acc = _accumulate(
    spec,
    acc * mosaic_rows.along_rows(decay, acc.shape),
    weights.astype(spec.shape.dtype),
    scratch.v.at[slot],
    item.kv_len - j * block_n if masked else None,
  )
  return registers.State(acc, top, norm), pages


def _scores(
  spec: fetching.Spec, queries: list[jax.Array], k_ref: Any
) -> jax.Array:
  """Returns queries @ keys.T, [ROWS, block_n] float32.

  Args:
    spec: of the kernel.
    queries: [ROWS, h], in pieces of channels.
    k_ref: [block_n, h].
  """
  if spec.interpret:
    return jnp.dot(
      jnp.concatenate(queries, axis=1),
      k_ref[...].T,
      preferred_element_type=jnp.float32,
    )
  layout = mosaic_rows.mma_layout('RHS', spec.shape.dtype)
  scores = plgpu.layout_cast(
    jnp.zeros((ROWS, spec.tile.block_n), jnp.float32), plgpu.Layout.WGMMA
  )
  for i, piece in enumerate(queries):
    keys = plgpu.load(
      k_ref.at[:, pl.ds(i * _SWIZZLED, _SWIZZLED)].T,
      layout=layout,
      optimized=False,
    )
    scores = plgpu.mma(scores, piece, keys)
  return scores


def _accumulate(
  spec: fetching.Spec,
  acc: jax.Array,
  weights: jax.Array,
  v_ref: Any,
  num_written: jax.Array | None,
) -> jax.Array:
  """Returns acc + weights @ values.

  Args:
    spec: of the kernel.
    acc: [ROWS, h] float32.
    weights: [ROWS, block_n].
    v_ref: [block_n, h].
    num_written: rows of v_ref that hold tokens, may be more than block_n; the
      others are taken as zeros, for 0 * NaN is NaN. None: all do.
  """

  def clear(values: jax.Array, first: int, **layout: Any) -> jax.Array:
    if num_written is None:
      return values
    at = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, **layout)
    return jnp.where(at < num_written - first, values, jnp.zeros_like(values))

  if spec.interpret:
    layout = plgpu.Layout.WGMMA
    return acc + jnp.dot(
      weights,
      clear(v_ref[...], 0, layout=layout),
      preferred_element_type=jnp.float32,
    )
  layout = mosaic_rows.mma_layout('RHS', spec.shape.dtype)
  for i, piece in enumerate(registers.as_left_operands(weights)):
    first = i * mosaic_rows.STEP
    values = plgpu.load(
      v_ref.at[pl.ds(first, mosaic_rows.STEP)], layout=layout, optimized=False
    )
    acc = plgpu.mma(acc, piece, clear(values, first, layout=layout))
  return acc
