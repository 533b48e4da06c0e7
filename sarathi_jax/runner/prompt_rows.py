# SPDX-License-Identifier: Apache-2.0
"""Tells the log-probabilities of prompts, a few rows at a time.

So logits of a whole chunk never exist. Does nothing in steps whose batch does
not ask, and so in nearly all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sarathi_jax import models
from sarathi_jax.models import config as model_config_lib
from sarathi_jax.models import sharding
from sarathi_jax.runner import batch as batch_lib
from sarathi_jax.runner import logprobs
from sarathi_jax.runner import packing
from sarathi_jax.runner import sampling_rows
from sarathi_jax.runner import told as told_lib

_BLOCK = 64  # rows

# Returns the residual stream, after all layers, of some of the batch's tokens.
RowsOf = Callable[[Int[Array, ' B']], Float[Array, 'B D']]


def tell(
  model: model_config_lib.ModelConfig,
  layout: batch_lib.BatchLayout,
  params: Any,
  b: batch_lib.BatchArrays,
  rows_of: Callable[[], RowsOf],
  shards: sharding.Shards,
) -> told_lib.ToldArrays:
  """Tells of the tokens that follow those of chunks with a `next_token`.

  Args:
    model, layout, params, b: the model, and the batch at the last stage.
    rows_of: called only if there is anything to tell.
    shards: of the mesh.

  Returns:
    What is told, token after token, and then anything; [T] each, or nothing if
    such a step tells nothing of prompts.
  """
  if not layout.tells_prompts:
    return logprobs.zeros(0, 0)
  num_tokens = layout.num_tokens
  block = min(_BLOCK, num_tokens)
  num_padded = -(-num_tokens // block) * block

  def tell_all() -> told_lib.ToldArrays:
    row = rows_of_tokens(layout, b)
    is_told, successors = _successors(layout, b, row)
    temperature = packing.as_float(b.next_temperatures)[row]
    order = jnp.nonzero(is_told, size=num_padded, fill_value=0)[0]
    num_blocks = -(-is_told.sum(dtype=jnp.int32) // block)
    rows = rows_of()

    def tell_some(i: Array, told: told_lib.ToldArrays) -> told_lib.ToldArrays:
      some = lax.dynamic_slice_in_dim(order, i * block, block)
      logits = models.unembed(
        model, params, models.final_norm(model, params, rows(some)), shards
      )
      mine = sampling_rows.share_of(successors[some], shards)
      by = sampling_rows.share_of(temperature[some], shards)
      found = logprobs.tell(
        sampling_rows.shares_of(model, logits, shards) / by[:, None],
        mine,
        jnp.zeros((len(mine), 0), jnp.int32),
      )
      if shards.axes:
        found = jax.tree.map(
          lambda x: lax.all_gather(x, shards.axes, tiled=True)[:block], found
        )
      return jax.tree.map(
        lambda all, some: lax.dynamic_update_slice_in_dim(
          all, some, i * block, axis=0
        ),
        told,
        found,
      )

    told = lax.fori_loop(
      0, num_blocks, tell_some, logprobs.zeros(num_padded, 0)
    )
    return jax.tree.map(lambda x: x[:num_tokens], told)

  told: told_lib.ToldArrays = lax.cond(
    (b.next_tokens != 0).any(),
    tell_all,
    lambda: logprobs.zeros(num_tokens, 0),
  )
  return told


def rows_of_tokens(
  layout: batch_lib.BatchLayout, b: batch_lib.BatchArrays
) -> Int[Array, ' T']:
  """Returns each token's row in the batch."""
  index = jnp.arange(layout.num_tokens, dtype=jnp.int32)
  return jnp.minimum(
    jnp.sum(index[:, None] >= b.cu_q_lens[None, 1:], axis=1, dtype=jnp.int32),
    layout.num_rows - 1,
  )


def _successors(
  layout: batch_lib.BatchLayout,
  b: batch_lib.BatchArrays,
  row: Int[Array, ' T'],
) -> tuple[Bool[Array, ' T'], Int[Array, ' T']]:
  """Returns of which tokens the successors are told, and all successors."""
  index = jnp.arange(layout.num_tokens, dtype=jnp.int32)
  next_token = b.next_tokens[row]
  is_last = index + 1 == b.cu_q_lens[row + 1]
  is_told = (index < b.cu_q_lens[-1]) & (next_token != 0)
  return (
    is_told & ~(is_last & (next_token < 0)),
    jnp.where(is_last, next_token - 1, jnp.roll(b.tokens, -1)),
  )
