# SPDX-License-Identifier: Apache-2.0
"""Plain JAX: runs anywhere, and is written for XLA's CPU backend.

Everything but shapes may be traced. Loops are as long as the pages in use,
not as the padding.

On CPUs the cache should be float32: XLA gathers no 16-bit floats there, and
converts the whole pool first, at every call.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.ragged_paged_attention import batch as batch_lib
from pallas_kernels.ragged_paged_attention import quantization
from pallas_kernels.ragged_paged_attention import xla_decode
from pallas_kernels.ragged_paged_attention import xla_prefill


def ragged_paged_attention(
  q: jax.Array,
  k_pages: quantization.Pages,
  v_pages: quantization.Pages,
  batch: batch_lib.Batch,
  options: batch_lib.Options,
  sinks: jax.Array | None = None,
) -> jax.Array:
  """Attends as `api.ragged_paged_attention`; pages are tiles (see `layout`)."""
  if options.batch_invariant:
    # Decodes share blocks of work, so they are chunks of a token, too.
    batch = batch._replace(distribution=batch.distribution.at[0].set(0))
  num_tokens, num_heads, head_dim = q.shape
  num_kv_heads = quantization.values_of(k_pages).shape[1]
  grouped = (q.astype(jnp.float32) * options.scale).reshape(
    num_tokens, num_kv_heads, num_heads // num_kv_heads, head_dim
  )
  if sinks is not None:
    sinks = sinks.astype(jnp.float32).reshape(num_kv_heads, -1)
  out = jnp.zeros_like(grouped)
  if not options.batch_invariant:
    most = min(num_tokens, batch.kv_lens.shape[0])  # decodes
    decoded = xla_decode.decodes(
      grouped[:most], k_pages, v_pages, batch, options, sinks
    )
    is_decode = (jnp.arange(most) < batch.distribution[0])[:, None, None, None]
    out = out.at[:most].set(jnp.where(is_decode, decoded, 0))
  out = xla_prefill.chunks(
    out, grouped, k_pages, v_pages, batch, options, sinks
  )
  return out.reshape(q.shape).astype(q.dtype)
