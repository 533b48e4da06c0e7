# SPDX-License-Identifier: Apache-2.0
"""Samples the rows of a batch that ask for it, on one device or on a mesh."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sarathi_jax.models import config as model_config_lib
from sarathi_jax.models import sharding
from sarathi_jax.runner import adjusting
from sarathi_jax.runner import batch as batch_lib
from sarathi_jax.runner import sampling
from sarathi_jax.runner import told as told_lib


def sample(
  model: model_config_lib.ModelConfig,
  logits: Float[Array, 'R columns'],
  b: Any,
  adjustments: adjusting.Adjustments | None,
  shards: sharding.Shards,
  masks: Int[Array, 'R words'] | None = None,
  *,
  deterministic: bool = False,
) -> tuple[
  batch_lib.StepOutput, told_lib.ToldArrays, adjusting.Adjustments | None
]:
  """Samples from logits of which each device has some columns.

  Exchanges columns of all rows for all columns of some rows. So devices share
  the work, and rows are sampled as they are on one device.

  Args:
    model: the model.
    logits: float32.
    b: the fields of samples of `batch.BatchArrays`.
    adjustments: of slots.
    shards: the devices.
    masks: which tokens may come, see `masking`. None: rows that follow a
      grammar are not sampled for good, so no adjustment counts them.
    deterministic: see `sampling.sample`.

  Returns:
    What is sampled, what is told of it, and the adjustments, which know of it.
  """
  rows = {
    **batch_lib.sampling_of(b.sampling),
    'seeds': b.seeds,
    'positions': b.sample_positions,
    'slots': b.sample_slots,
  }
  is_masked = rows.pop('is_masked')
  counts = rows['is_adjusted']
  if masks is None:
    counts &= ~is_masked
  else:
    rows['masks'] = masks
  sample_rows = functools.partial(_sample_rows, deterministic=deterministic)
  if not shards.axes:
    output, told = sample_rows(logits, adjustments, **rows)
  else:
    output, told = _sample_shares(
      model, logits, adjustments, rows, shards, sample_rows
    )
  if adjustments is not None:
    adjustments = adjusting.count(
      adjustments, b.sample_slots, counts, output.tokens
    )
  return output, told, adjustments


def _sample_shares(
  model: model_config_lib.ModelConfig,
  logits: Float[Array, 'R columns'],
  adjustments: adjusting.Adjustments | None,
  rows: dict[str, Array],
  shards: sharding.Shards,
  sample_rows: Callable[..., Any],
) -> tuple[batch_lib.StepOutput, told_lib.ToldArrays]:
  """Samples a share of the rows on each device; returns all, on all."""
  num_rows = logits.shape[0]
  shares = sample_rows(
    shares_of(model, logits, shards),
    adjustments,
    **{name: share_of(row, shards) for name, row in rows.items()},
  )

  # What is told, too, though it may be nothing: a condition in which devices
  # talk to one another can't be in a CUDA graph.
  gathered: tuple[batch_lib.StepOutput, told_lib.ToldArrays] = jax.tree.map(
    lambda x: lax.all_gather(x, shards.axes, tiled=True)[:num_rows], shares
  )
  return gathered


def shares_of(
  model: model_config_lib.ModelConfig,
  logits: Float[Array, 'R columns'],
  shards: sharding.Shards,
) -> Float[Array, 'share V']:
  """Exchanges some columns of all rows for all columns of some rows."""
  if not shards.axes:
    return logits
  padded = _padded(logits, shards)
  logits = lax.all_to_all(padded, shards.axes, 0, 1, tiled=True)
  return logits[:, : model.vocab_size]


def share_of(row: Array, shards: sharding.Shards) -> Array:
  """Returns a device's share of what is known of all rows."""
  if not shards.axes:
    return row
  row = _padded(row, shards)
  share = row.shape[0] // lax.axis_size(shards.axes)
  start = lax.axis_index(shards.axes) * share
  return lax.dynamic_slice_in_dim(row, start, share)


def _padded(row: Array, shards: sharding.Shards) -> Array:
  """Pads rows to shares of one size, with the last one's request."""
  missing = -row.shape[0] % lax.axis_size(shards.axes)
  widths = [(0, missing)] + [(0, 0)] * (row.ndim - 1)
  return jnp.pad(row, widths, mode='edge')


def _sample_rows(
  logits: Float[Array, 'rows V'],
  adjustments: adjusting.Adjustments | None,
  *,
  slots: Int[Array, ' rows'],
  is_adjusted: Bool[Array, ' rows'],
  repetition_penalty: Float[Array, ' rows'],
  presence_penalty: Float[Array, ' rows'],
  frequency_penalty: Float[Array, ' rows'],
  positions: Int[Array, ' rows'],
  telling: Int[Array, ' rows'],
  masks: Int[Array, 'rows words'] | None = None,
  deterministic: bool = False,
  **others: Array,
) -> tuple[batch_lib.StepOutput, told_lib.ToldArrays]:
  """Samples one token a row; see `sampling.sample` for the `others`."""
  adjust = None
  named = jnp.zeros((len(slots), told_lib.NUM_NAMED), jnp.int32)
  if adjustments is not None:
    named = adjustments.named.at[slots].get(mode='clip')
    adjust = sampling.Adjust(
      is_adjusted,
      lambda logits: adjusting.adjust(
        adjustments,
        logits,
        slots,
        positions,
        is_adjusted,
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
      ),
    )
  output, told = sampling.sample(
    logits,
    positions=positions,
    adjust=adjust,
    tell=sampling.Tell(telling, named),
    allowed=None if masks is None else _allowed(masks, logits.shape[1]),
    deterministic=deterministic,
    **others,
  )
  assert told is not None
  return output, told


def _allowed(
  masks: Int[Array, 'rows words'], vocab_size: int
) -> Bool[Array, 'rows V']:
  bits = masks[:, :, None] >> jnp.arange(32, dtype=jnp.int32)[None, None]
  return (bits.reshape(len(masks), -1)[:, :vocab_size] & 1) != 0


def keep_last(
  last_tokens: Int[Array, ' slots'],
  b: Any,
  sampled: Int[Array, ' R'],
) -> Int[Array, ' slots']:
  """Returns each slot's last token, updated where one was sampled."""
  index = jnp.arange(sampled.shape[0], dtype=jnp.int32)
  is_last = (index + 1 == b.num_samples) | (
    b.sample_slots != jnp.roll(b.sample_slots, -1)
  )
  return last_tokens.at[
    jnp.where(
      is_last & (index < b.num_samples), b.sample_slots, last_tokens.shape[0]
    )
  ].set(sampled, mode='drop')


def packed(arrays: Sequence[Array]) -> Int[Array, ' output']:
  """Returns what is sampled, or told of it, as one array."""
  return jnp.concatenate([x.view(jnp.int32).ravel() for x in arrays])
