# SPDX-License-Identifier: Apache-2.0
"""What a warpgroup's registers do in Mosaic's kernels: softmax, rows, products.

A warpgroup keeps ROWS rows of queries: of scores, of weights and of sums each
thread has two neighbouring columns of eight, of two rows that are eight apart.
That is the layout of wgmma's results (`plgpu.Layout.WGMMA`), and of mma's.
Shape letters are those of `api`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental.pallas import mosaic_gpu
import jax.numpy as jnp

from pallas_kernels import mosaic_rows
from pallas_kernels.ragged_paged_attention import batch as batch_lib

plgpu: Any = mosaic_gpu  # JAX 0.10 lacks half of it.
ROWS, STEP = mosaic_rows.ROWS, mosaic_rows.STEP
MASKED = -1e30  # finite: the difference of two of them is no NaN
_LOG2_E = math.log2(math.e)


class State(NamedTuple):
  """The online softmax of a warpgroup's rows, float32.

  Attributes:
    acc: [ROWS, h], sums of weighted values.
    top: [ROWS], the highest scores.
    norm: [ROWS], sums of weights.
  """

  acc: Any
  top: Any
  norm: Any


def start(head_dim: int) -> State:
  """Returns the state of rows that have seen nothing."""

  def full(shape: tuple[int, ...], value: float, layout: Any) -> jax.Array:
    filled: jax.Array = plgpu.layout_cast(
      jnp.full(shape, value, jnp.float32), layout
    )
    return filled

  of_rows = plgpu.Layout.WGMMA.reduce(1)
  return State(
    full((ROWS, head_dim), 0.0, plgpu.Layout.WGMMA),
    full((ROWS,), MASKED, of_rows),
    full((ROWS,), 0.0, of_rows),
  )


def factor(options: batch_lib.Options) -> float:
  """Returns what makes of a score of `weigh` a power of two."""
  return _LOG2_E * (options.soft_cap or options.scale)


def weigh(
  options: batch_lib.Options,
  scores: jax.Array,
  top: jax.Array,
  last: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Takes a block of keys into the online softmax.

  Args:
    options: of the attention.
    scores: [ROWS, block_n] float32, products of queries and keys.
    top: [ROWS] float32, the highest scores before, of `State`.
    last: [ROWS] int32, where in the block the last key is that a row sees,
      which may be before or after the block; None if all see all of it.

  Returns:
    The keys' weights, [ROWS, block_n]; what the sums so far are to be
    multiplied by, [ROWS]; and the new highest scores, [ROWS].
  """
  shape: Any = scores.shape
  if (cap := options.soft_cap) is not None:
    # tanh, whose own approximation is off by 2**-11.
    power = 2 * options.scale * _LOG2_E / cap
    scores = 1 - 2 / (jnp.exp2(scores * power) + 1)
  if last is not None:
    # The barrier keeps it from being computed once before the loop, and from
    # taking up 64 registers meanwhile.
    at = lax.optimization_barrier(
      plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
    )
    scores = jnp.where(
      at <= mosaic_rows.along_rows(last, shape), scores, MASKED
    )
    if (window := options.sliding_window) is not None:
      scores = jnp.where(
        at > mosaic_rows.along_rows(last - window, shape), scores, MASKED
      )
  new_top = jnp.maximum(top, scores.max(axis=1))
  reached = new_top
  if last is not None:
    # Where a row sees nothing yet, its top's rounded product would not cancel.
    reached = jnp.where(new_top > MASKED, new_top, 0.0)
  # A product and a difference become one instruction.
  by = factor(options)
  shift = reached * by
  decay = jnp.exp2(top * by - shift)
  weights = jnp.exp2(scores * by - mosaic_rows.along_rows(shift, shape))
  return weights, decay, new_top


def as_left_operands(weights: jax.Array) -> list[jax.Array]:
  """Returns [ROWS, n] of 16 bits as mma's left operands, of STEP columns each.

  What a thread has of 16 columns of scores are the registers, in their order,
  that mma wants of it: nothing is moved. Mosaic does not know that.
  """
  layout = mosaic_rows.mma_layout('LHS', weights.dtype)
  shape = ROWS, STEP
  count = weights.shape[1] // STEP
  kind = plgpu.ShapeDtypeStruct(shape, weights.dtype, layout=layout)

  @plgpu.inline_mgpu(
    arg_types=(plgpu.Layout.WGMMA,), return_type=[kind] * count
  )
  def relabel(context: Any, x: Any) -> Any:
    del context
    return [
      mosaic_rows.array_of(registers, layout.to_mgpu(), shape)
      for registers in x.registers.reshape(count, -1)
    ]

  pieces: list[jax.Array] = relabel(weights)
  return pieces
