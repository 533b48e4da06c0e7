# SPDX-License-Identifier: Apache-2.0
"""The definition of the operation: a plain loop over sequences, in NumPy.

It reads values, so it can't be traced: call it outside `jax.jit`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import unpacking
from pallas_kernels.ragged_paged_attention import batch as batch_lib
from pallas_kernels.ragged_paged_attention import layout
from pallas_kernels.ragged_paged_attention import quantization


def ragged_paged_attention(
  q: jax.Array,  # [T, H, h]
  k_pages: quantization.Pages,  # any layout
  v_pages: quantization.Pages,
  batch: batch_lib.Batch,
  options: batch_lib.Options,
  sinks: jax.Array | None = None,  # [H]
) -> jax.Array:
  """Attends as `api.ragged_paged_attention`. Rows of padding are zero.

  Raises:
    NotImplementedError: it is traced.
  """
  if any(
    isinstance(x, jax.core.Tracer)
    for x in jax.tree.leaves((q, k_pages, v_pages, batch, sinks))
  ):
    raise NotImplementedError(
      'reference: it looks at values: call it outside jax.jit.'
    )
  queries = np.asarray(q)
  keys, values = map(_numbers, layout.to_rows(k_pages, v_pages))
  lens, tables, starts, distribution = map(np.asarray, batch)
  out = np.zeros(queries.shape, np.float32)
  for s in range(int(distribution[1])):
    start, stop, context = int(starts[s]), int(starts[s + 1]), int(lens[s])
    if start == stop:
      continue
    out[start:stop] = _attend(
      queries[start:stop].astype(np.float32),
      _gather(keys, tables[s], context),
      _gather(values, tables[s], context),
      options,
      None if sinks is None else np.asarray(sinks, np.float32),
    )
  return jnp.asarray(out, q.dtype)


def _numbers(pages: quantization.Pages) -> np.ndarray:
  if not isinstance(pages, quantization.Quantized):
    return np.asarray(pages)
  return np.asarray(
    unpacking.decode(pages.values, jnp.float32) * pages.scales[..., None]
  )


def _gather(pages: np.ndarray, table: np.ndarray, context: int) -> np.ndarray:
  """Returns a sequence's first `context` rows, [context, K, h] float32.

  Args:
    pages: [N, K, page_size, h].
    table: [P], the sequence's pages.
    context: tokens in the cache.
  """
  num_kv_heads, page_size, head_dim = pages.shape[1:]
  used = pages[table[: -(-context // page_size)]]  # [pages, K, page_size, h]
  rows = used.transpose(0, 2, 1, 3).reshape(-1, num_kv_heads, head_dim)
  return rows[:context].astype(np.float32)


def _attend(
  q: np.ndarray,  # [q_len, H, h]
  k: np.ndarray,  # [context, K, h]
  v: np.ndarray,  # [context, K, h]
  options: batch_lib.Options,
  sinks: np.ndarray | None,  # [H]
) -> np.ndarray:
  """Returns the last `q_len` rows of causal attention, [q_len, H, h]."""
  q_len, num_heads, head_dim = q.shape
  context, num_kv_heads, _ = k.shape
  grouped = q.reshape(q_len, num_kv_heads, num_heads // num_kv_heads, head_dim)
  scores = np.einsum('qkgh,ckh->qkgc', grouped, k, optimize=True)
  scores *= options.scale
  if (cap := options.soft_cap) is not None:
    scores = cap * np.tanh(scores / cap)
  q_at = context - q_len + np.arange(q_len)
  distance = q_at[:, None] - np.arange(context)[None, :]
  seen = distance >= 0
  if options.sliding_window is not None:
    seen &= distance < options.sliding_window
  scores = np.where(seen[:, None, None, :], scores, -np.inf)
  if sinks is not None:
    of_rows = sinks.reshape(1, num_kv_heads, -1, 1)
    of_rows = np.broadcast_to(of_rows, (*scores.shape[:-1], 1))
    scores = np.concatenate((scores, of_rows), -1)
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  weights /= weights.sum(-1, keepdims=True)
  weights = weights[..., :context]
  out = np.einsum('qkgc,ckh->qkgh', weights, v, optimize=True)
  return out.reshape(q_len, num_heads, head_dim)
