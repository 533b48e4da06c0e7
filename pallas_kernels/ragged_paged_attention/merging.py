# SPDX-License-Identifier: Apache-2.0
"""Merges the partial results of `pallas_triton`, by Triton."""

from __future__ import annotations

from collections.abc import Callable
import math
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
import jax.numpy as jnp

from pallas_kernels.ragged_paged_attention import batch as batch_lib
from pallas_kernels.ragged_paged_attention import tuning

MASKED = -1e30  # a score; finite: the difference of two of them is no NaN


def take_turns(num_items: jax.Array, do: Callable[[jax.Array], None]) -> None:
  """Does this block's part of items: every so-many-th."""
  block, num_blocks = pl.program_id(0), pl.num_programs(0)

  def turn(i: jax.Array, _: None) -> None:
    do(block + i * num_blocks)

  turns = lax.div(num_items - block + num_blocks - 1, num_blocks)
  lax.fori_loop(0, turns, turn, None)


def add_sinks(
  norm: jax.Array, top: jax.Array, sinks_ref: Any, heads: jax.Array
) -> jax.Array:
  """Adds what sinks weigh to the sums of weights of whole rows.

  To whole ones only: of a row that is split, once its parts are merged. A sink
  far above all scores makes a sum infinite, and the output 0.

  Args:
    norm: [...] float32, the sums.
    top: [...] float32, the highest scores of the rows, times log2(e).
    sinks_ref: [H] float32; None: there are none.
    heads: [...] int32, the rows' query heads.
  """
  if sinks_ref is None:
    return norm
  sinks = plgpu.load(sinks_ref.at[heads])
  return norm + jnp.exp2(sinks * math.log2(math.e) - top)


def merge(
  old_out_ref: Any,
  acc_ref: Any,
  top_ref: Any,
  norm_ref: Any,
  starts_ref: Any,
  sinks_ref: Any,
  seq_ref: Any,
  row_ref: Any,
  slot_ref: Any,
  count_ref: Any,
  num_merges_ref: Any,
  out_ref: Any,
  *,
  tile: tuning.Tile,
  shape: tuning.Shape,
  options: batch_lib.Options,
  interpret: bool,
) -> None:
  """Merges the partial results of split tiles, a row and a KV head at a time.

  Args:
    old_out_ref: [T, H, h], the same memory as out_ref.
    acc_ref, top_ref, norm_ref: see `pallas_triton._attend_small`.
    starts_ref: [S + 1] int32, `cu_q_lens`.
    sinks_ref: see `add_sinks`.
    seq_ref, row_ref, slot_ref, count_ref: [M] int32: `plan.Small.merge_seq`,
      `merge_row`, `merge_slot` and `merge_count`.
    num_merges_ref: [1] int32, of it.
    out_ref: [T, H, h], outputs.
    tile, shape: see `pallas_triton._attend_small`.
    options, interpret: not needed.
  """
  del old_out_ref, options, interpret  # The first is out_ref.
  part = jnp.arange(tile.block_n, dtype=jnp.int32)

  def merge_row(turn: jax.Array) -> None:
    row, rest = turn % tile.rows, turn // tile.rows
    head, item = rest % shape.num_kv_heads, rest // shape.num_kv_heads
    seq, slot, count = seq_ref[item], slot_ref[item], count_ref[item]
    first_token, end = starts_ref[seq], starts_ref[seq + 1]
    query, member = (
      lax.div(row_ref[item] + row, shape.group),
      lax.rem(row_ref[item] + row, shape.group),
    )

    def body(i: jax.Array, state: Any) -> Any:
      acc, top, norm = state
      is_there = i * tile.block_n + part < count
      slots = slot + i * tile.block_n + part

      def load(ref: Any, other: float, *channels: jax.Array) -> jax.Array:
        at = slots.reshape(-1, *[1] * len(channels))
        mask = is_there.reshape(at.shape)
        index = (at, head, row, *(d[None] for d in channels))
        shape_ = (tile.block_n, *(len(d) for d in channels))
        return plgpu.load(
          ref.at[index], mask=jnp.broadcast_to(mask, shape_), other=other
        )

      tops = load(top_ref, MASKED)
      new_top = jnp.maximum(top, tops.max())
      old_weight, weights = jnp.exp2(top - new_top), jnp.exp2(tops - new_top)
      acc = [
        a * old_weight + (weights[:, None] * load(acc_ref, 0.0, d)).sum(axis=0)
        for a, d in zip(acc, shape.channels(), strict=True)
      ]
      norms = (weights * load(norm_ref, 0.0)).sum()
      return acc, new_top, norm * old_weight + norms

    @pl.when(first_token + query < end)
    def put_together() -> None:
      acc, top, norm = lax.fori_loop(
        0,
        lax.div(count + tile.block_n - 1, tile.block_n),
        body,
        (
          [jnp.zeros((size,), jnp.float32) for _, size in shape.pieces],
          jnp.float32(MASKED),
          jnp.float32(0),
        ),
      )
      query_head = head * shape.group + member
      norm = add_sinks(norm, top, sinks_ref, query_head)
      for d, a in zip(shape.channels(), acc, strict=True):
        plgpu.store(
          out_ref.at[first_token + query, query_head, d],
          (a / norm).astype(out_ref.dtype),
        )

  take_turns(num_merges_ref[0] * shape.num_kv_heads * tile.rows, merge_row)
