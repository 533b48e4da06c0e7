# SPDX-License-Identifier: Apache-2.0
"""Samples the rows of a batch that ask for it, on one device or on a mesh."""

from __future__ import annotations

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sarathi_jax.models import config as model_config_lib
from sarathi_jax.models import sharding
from sarathi_jax.runner import adjusting
from sarathi_jax.runner import batch as batch_lib
from sarathi_jax.runner import sampling


def sample(
  model: model_config_lib.ModelConfig,
  logits: Float[Array, 'R columns'],
  b: batch_lib.BatchArrays,
  adjustments: adjusting.Adjustments | None,
  shards: sharding.Shards,
) -> tuple[batch_lib.StepOutput, adjusting.Adjustments | None]:
  """Samples from logits of which each device has some columns.

  Exchanges columns of all rows for all columns of some rows. So devices share
  the work, and rows are sampled as they are on one device.

  Returns:
    What is sampled, and the adjustments, which know of it.
  """
  rows = {
    **batch_lib.sampling_of(b.sampling),
    'seeds': b.seeds,
    'positions': b.sample_positions,
    'slots': b.sample_slots,
  }
  if not shards.axes:
    output = _sample_rows(logits, adjustments, **rows)
  else:
    output = _sample_shares(model, logits, adjustments, rows, shards)
  if adjustments is not None:
    adjustments = adjusting.count(
      adjustments, b.sample_slots, rows['is_adjusted'], output.tokens
    )
  return output, adjustments


def _sample_shares(
  model: model_config_lib.ModelConfig,
  logits: Float[Array, 'R columns'],
  adjustments: adjusting.Adjustments | None,
  rows: dict[str, Array],
  shards: sharding.Shards,
) -> batch_lib.StepOutput:
  """Samples a share of the rows on each device; returns all, on all."""
  num_rows, num_devices = logits.shape[0], lax.axis_size(shards.axes)
  share = -(-num_rows // num_devices)

  def padded(row: Array) -> Array:  # Padding repeats the last row's request.
    last = (share * num_devices - num_rows, *[0] * (row.ndim - 1))
    return jnp.pad(row, [(0, n) for n in last], mode='edge')

  logits = lax.all_to_all(padded(logits), shards.axes, 0, 1, tiled=True)
  start = lax.axis_index(shards.axes) * share
  output = _sample_rows(
    logits[:, : model.vocab_size],
    adjustments,
    **{
      name: lax.dynamic_slice_in_dim(padded(row), start, share)
      for name, row in rows.items()
    },
  )
  gathered: batch_lib.StepOutput = jax.tree.map(
    lambda x: lax.all_gather(x, shards.axes, tiled=True)[:num_rows], output
  )
  return gathered


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
  **others: Array,
) -> batch_lib.StepOutput:
  """Samples one token a row; see `sampling.sample` for the `others`."""
  adjust = None
  if adjustments is not None:
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
  return sampling.sample(logits, positions=positions, adjust=adjust, **others)
