# SPDX-License-Identifier: Apache-2.0
"""The definition of the operation: a plain loop over sequences, in NumPy.

It looks at values, so it can't be traced: call it outside `jax.jit`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.ragged_paged_attention import layout


def ragged_paged_attention(
  q: jax.Array,  # [T, H, h]
  k_pages: jax.Array,  # any layout
  v_pages: jax.Array,
  kv_lens: jax.Array,  # [S]
  page_indices: jax.Array,  # [S, P]
  cu_q_lens: jax.Array,  # [S + 1]
  distribution: jax.Array,  # [2]
  *,
  scale: float,
  sliding_window: int | None = None,
  soft_cap: float | None = None,
) -> jax.Array:
  """See `api.ragged_paged_attention`. Rows of padding are zero."""
  queries = np.asarray(q)
  keys, values = map(np.asarray, layout.to_rows(k_pages, v_pages))
  lens, tables, starts = map(
    np.asarray, (kv_lens, page_indices, cu_q_lens))
  out = np.zeros(queries.shape, np.float32)
  for s in range(int(distribution[1])):
    start, stop, context = int(starts[s]), int(starts[s + 1]), int(lens[s])
    out[start:stop] = _attend(
      queries[start:stop].astype(np.float32),
      _gather(keys, tables[s], context), _gather(values, tables[s], context),
      scale=scale, sliding_window=sliding_window, soft_cap=soft_cap)
  return jnp.asarray(out, q.dtype)


def _gather(pages: np.ndarray, table: np.ndarray, context: int) -> np.ndarray:
  """The first `context` rows that the pages of a sequence hold, float32."""
  num_kv_heads, page_size, head_dim = pages.shape[1:]
  used = pages[table[:-(-context // page_size)]]  # [pages, K, page_size, h]
  rows = used.transpose(0, 2, 1, 3).reshape(-1, num_kv_heads, head_dim)
  return rows[:context].astype(np.float32)


def _attend(
  q: np.ndarray,  # [q_len, H, h]
  k: np.ndarray,  # [context, K, h]
  v: np.ndarray,  # [context, K, h]
  *,
  scale: float,
  sliding_window: int | None,
  soft_cap: float | None,
) -> np.ndarray:
  """The last `q_len` rows of causal attention."""
  q_len, num_heads, head_dim = q.shape
  context, num_kv_heads, _ = k.shape
  grouped = q.reshape(q_len, num_kv_heads, -1, head_dim)
  scores = np.einsum('qkgh,ckh->qkgc', grouped, k, optimize=True) * scale
  if soft_cap is not None:
    scores = soft_cap * np.tanh(scores / soft_cap)
  q_at = context - q_len + np.arange(q_len)
  distance = q_at[:, None] - np.arange(context)[None, :]
  seen = distance >= 0
  if sliding_window is not None:
    seen &= distance < sliding_window
  scores = np.where(seen[:, None, None, :], scores, -np.inf)
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  weights /= weights.sum(-1, keepdims=True)
  out = np.einsum('qkgc,ckh->qkgh', weights, v, optimize=True)
  return out.reshape(q_len, num_heads, head_dim)
