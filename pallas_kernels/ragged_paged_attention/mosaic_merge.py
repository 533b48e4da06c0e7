# SPDX-License-Identifier: Apache-2.0
"""Merges the partial results of `mosaic_ampere`, by Mosaic.

Shape letters are those of `api`; M is that of `plan.Small`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu
import jax.numpy as jnp

from pallas_kernels import mosaic_rows
from pallas_kernels.ragged_paged_attention import mosaic_ampere
from pallas_kernels.ragged_paged_attention import mosaic_fetch
from pallas_kernels.ragged_paged_attention import mosaic_registers as registers

plgpu: Any = mosaic_gpu  # JAX 0.10 lacks half of it.
_COLUMNS = 32  # of a turn
_AT_ONCE = 4  # partial results


class Inputs(NamedTuple):
  """Refs in the device's memory."""

  rows: Any  # [T * H, h], outputs
  acc: Any  # of `mosaic_ampere.Partials`, like the next two
  top: Any
  norm: Any
  cu_q_lens: Any  # [S + 1] int32
  seq: Any  # [M] int32: `plan.Small.merge_seq`, and so on
  first_row: Any  # [M] int32
  slot: Any  # [M] int32
  count: Any  # [M] int32
  num_merges: Any  # [1] int32


def merge(spec: mosaic_fetch.Spec, inputs: Inputs) -> None:
  """Merges some columns of a split tile of one KV head at a time."""
  kv_heads = spec.shape.num_kv_heads
  pieces = spec.shape.head_dim // _COLUMNS

  def turn(work: jax.Array) -> None:
    rest = lax.div(work, jnp.int32(pieces))
    item = lax.div(rest, jnp.int32(kv_heads))
    head = lax.rem(rest, jnp.int32(kv_heads))
    columns = pl.ds(lax.rem(work, jnp.int32(pieces)) * _COLUMNS, _COLUMNS)
    slot, count = inputs.slot[item], inputs.count[item]
    mine = jnp.minimum(mosaic_rows.row_numbers(), spec.tile.rows - 1)
    place, _ = mosaic_ampere.places(
      spec,
      inputs.cu_q_lens,
      inputs.seq[item],
      inputs.first_row[item],
      head,
      mine,
    )

    def load(ref: Any, i: jax.Array) -> Any:
      number = jnp.minimum(i, count - 1) + slot
      at = (number * kv_heads + head) * spec.tile.rows + mine
      return mosaic_rows.load_rows(ref, at, spec.interpret)

    def some(i: jax.Array, state: registers.State) -> registers.State:
      """Takes _AT_ONCE results into the sums."""
      numbers = [i * _AT_ONCE + n for n in range(_AT_ONCE)]
      tops = [
        load(inputs.top, n) + jnp.where(n < count, 0.0, registers.MASKED)
        for n in numbers
      ]
      acc, top, norm = state
      new_top = top
      for t in tops:
        new_top = jnp.maximum(new_top, t)
      decay = jnp.exp2(top - new_top)
      acc = acc * mosaic_rows.along_rows(decay, acc.shape)
      norm = norm * decay
      for n, t in zip(numbers, tops, strict=True):
        weight = jnp.exp2(t - new_top)
        norm = norm + weight * load(inputs.norm, n)
        acc = acc + mosaic_rows.along_rows(weight, acc.shape) * load(
          inputs.acc.at[:, columns], n
        )
      return registers.State(acc, new_top, norm)

    acc, _, norm = lax.fori_loop(
      0,
      lax.div(count + (_AT_ONCE - 1), jnp.int32(_AT_ONCE)),
      some,
      registers.start(_COLUMNS),
    )
    out = acc * mosaic_rows.along_rows(1 / norm, acc.shape)
    mosaic_rows.store_rows(
      inputs.rows.at[:, columns],
      place,
      out.astype(spec.shape.dtype),
      spec.interpret,
    )

  mosaic_ampere.take_turns(
    inputs.num_merges[0] * kv_heads * pieces, spec.tile.num_blocks, turn
  )
