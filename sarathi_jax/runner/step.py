# SPDX-License-Identifier: Apache-2.0
"""The step: one XLA program over one hybrid batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels import ragged_paged_attention as rpa
from sarathi_jax import models
from sarathi_jax.models import config as model_config_lib
from sarathi_jax.runner import batch as batch_lib
from sarathi_jax.runner import kv_cache
from sarathi_jax.runner import sampling

Params = Any  # a pytree of arrays, as models.param_specs says


def _to_float(bits: Array) -> Array:
  return lax.bitcast_convert_type(bits, jnp.float32)


def stage_step(
    params: Params,
    kv: Sequence[kv_cache.LayerKv],
    last_tokens: Int[Array, ' slots'],
    buffer: Int[Array, ' size'],
    *,
    model: model_config_lib.ModelConfig,
    layout: batch_lib.BatchLayout,
    page_size: int,
    attention: str | None,
) -> tuple[list[kv_cache.LayerKv], Array, Int[Array, '2 S']]:
  """Computes a batch's tokens and samples where its rows say so.

  Args:
    params: the weights.
    kv: the pages, donated.
    last_tokens: each slot's last sampled token, donated.
    buffer: the batch, see `batch.BatchLayout`.
    model, layout, page_size, attention: fixed when compiled.

  Returns:
    The pages and last tokens, updated in place, and the sampled tokens in one
    array: token ids, then the bits of their float32 log-probabilities.
  """
  b = layout.split(buffer, _to_float)
  num_rows = layout.num_rows
  index = jnp.arange(layout.num_tokens, dtype=jnp.int32)
  row = jnp.minimum(
    jnp.sum(index[:, None] >= b.cu_q_lens[None, 1:], axis=1, dtype=jnp.int32),
    num_rows - 1)
  is_real = index < b.cu_q_lens[-1]
  # A row's tokens are its sequence's last ones.
  positions = jnp.where(
    is_real, index + (b.kv_lens - b.cu_q_lens[1:])[row], 0)
  from_device = (b.flags & batch_lib.FROM_DEVICE) != 0
  tokens = jnp.where(
    from_device[row], last_tokens[b.slots][row], b.tokens)
  num_slots = kv[0][0].shape[0] * page_size
  slot_mapping = jnp.where(
    is_real, b.page_indices[row, positions // page_size] * page_size
    + positions % page_size, num_slots)

  plans: dict[int | None, Any] = {}  # by window: layers share their work

  def attend(layer_kv: kv_cache.LayerKv, q: Array, k: Array, v: Array, *,
             scale: float, window: int | None) -> tuple[Array, Any]:
    # The cache may have a dtype of its own, see `kv_cache.dtype_on`.
    q_kv, k, v = (x.astype(layer_kv[0].dtype) for x in (q, k, v))
    pages = rpa.write_kv(*layer_kv, k, v, slot_mapping)
    if window not in plans:
      plans[window] = rpa.make_plan(
        q_kv, pages[0], b.kv_lens, b.cu_q_lens, b.distribution,
        sliding_window=window)
    out = rpa.ragged_paged_attention(
      q_kv, *pages, b.kv_lens, b.page_indices, b.cu_q_lens, b.distribution,
      scale=scale, sliding_window=window, plan=plans[window],
      implementation=attention)
    return out.astype(q.dtype), pages

  rope_lens = None
  if model.rope.kind == 'dynamic':
    rope_lens = jnp.maximum(b.prompt_lens[row], positions + 1)
  hidden, new_kv = models.forward(
    model, params, kv, tokens, positions, rope_lens, attend)
  last = jnp.maximum(b.cu_q_lens[1:] - 1, 0)
  logits = models.unembed(model, params, hidden[last])
  sampled, logprobs = sampling.sample(
    logits, b.temperature, b.top_k, b.top_p, b.min_p, b.seeds, b.kv_lens)
  samples = (b.flags & batch_lib.SAMPLES) != 0
  last_tokens = last_tokens.at[
    jnp.where(samples, b.slots, last_tokens.shape[0])].set(
      sampled, mode='drop')
  out = jnp.stack([sampled, lax.bitcast_convert_type(logprobs, jnp.int32)])
  return new_kv, last_tokens, out
