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

from pallas_kernels.ragged_paged_attention import xla_decode
from pallas_kernels.ragged_paged_attention import xla_prefill


def ragged_paged_attention(
  q: jax.Array,
  k_pages: jax.Array,
  v_pages: jax.Array,
  kv_lens: jax.Array,
  page_indices: jax.Array,
  cu_q_lens: jax.Array,
  distribution: jax.Array,
  *,
  scale: float,
  sliding_window: int | None = None,
  soft_cap: float | None = None,
) -> jax.Array:
  """See `api.ragged_paged_attention`; the pages are tiles (see `layout`)."""
  num_tokens, num_heads, head_dim = q.shape
  num_kv_heads = k_pages.shape[1]
  grouped = (q.astype(jnp.float32) * scale).reshape(
    num_tokens, num_kv_heads, num_heads // num_kv_heads, head_dim)
  most = min(num_tokens, kv_lens.shape[0])  # decodes
  decoded = xla_decode.decodes(
    grouped[:most], k_pages, v_pages, kv_lens[:most], page_indices[:most],
    distribution[0], sliding_window=sliding_window, soft_cap=soft_cap)
  is_decode = (jnp.arange(most) < distribution[0])[:, None, None, None]
  out = jnp.zeros_like(grouped).at[:most].set(jnp.where(is_decode, decoded, 0))
  out = xla_prefill.chunks(
    out, grouped, k_pages, v_pages, kv_lens, page_indices, cu_q_lens,
    distribution, sliding_window=sliding_window, soft_cap=soft_cap)
  return out.reshape(q.shape).astype(q.dtype)
