# SPDX-License-Identifier: Apache-2.0
"""Plain JAX: runs anywhere.

Two loops in one program: decodes advance together, a column of pages at a
time; chunks of prefills go one tile of queries after the other.
"""

from __future__ import annotations

import functools

import jax
from jax import lax
import jax.numpy as jnp

_MASKED = -1e30  # finite, so that a row with all masked gives no NaN
_TILE = 128  # queries


def ragged_paged_attention(
  q, k_pages, v_pages, kv_lens, page_indices, cu_q_lens, distribution, *,
  scale, sliding_window=None, soft_cap=None,
) -> jax.Array:
  """See `api.ragged_paged_attention`."""
  T, H, h = q.shape
  K = k_pages.shape[1]
  S = kv_lens.shape[0]
  qg = (q.astype(jnp.float32) * scale).reshape(T, K, H // K, h)
  options = dict(sliding_window=sliding_window, soft_cap=soft_cap)
  n = min(S, T)
  decoded = _decodes(
    qg[:n], k_pages, v_pages, kv_lens[:n], page_indices[:n],
    distribution[0], **options)
  out = jnp.zeros((T + _TILE, *qg.shape[1:]), jnp.float32)
  out = _chunks(out, qg, k_pages, v_pages, kv_lens, page_indices, cu_q_lens,
                distribution, **options)[:T]
  is_decode = jnp.arange(n) < distribution[0]
  out = out.at[:n].set(
    jnp.where(is_decode[:, None, None, None], decoded, out[:n]))
  return out.reshape(q.shape).astype(q.dtype)


def _capped(scores, soft_cap):
  return scores if soft_cap is None else soft_cap * jnp.tanh(scores / soft_cap)


def _fold(state, scores, v, contract):
  """One step of the online softmax."""
  acc, top, total = state
  new_top = jnp.maximum(top, scores.max(-1))
  old = jnp.exp(top - new_top)
  p = jnp.exp(scores - new_top[..., None])
  return (acc * old[..., None] + contract(p, v), new_top,
          total * old + p.sum(-1))


def _decodes(q, k_pages, v_pages, kv_lens, page_indices, num_decodes, *,
             sliding_window, soft_cap):
  page_size = k_pages.shape[2]
  live = jnp.arange(q.shape[0]) < num_decodes
  stop = jnp.where(live, kv_lens, 0)
  start = jnp.zeros_like(stop) if sliding_window is None else jnp.maximum(
    stop - sliding_window, 0)
  first = jnp.min(jnp.where(live, start // page_size, page_indices.shape[1]))

  def column(c, state):
    page = page_indices[:, c]
    at = c * page_size + jnp.arange(page_size)
    seen = (at >= start[:, None]) & (at < stop[:, None])  # [n, page_size]
    used = seen.any(-1)
    page = jnp.where(used, page, 0)
    k = k_pages[page].astype(jnp.float32)  # [n, K, page_size, h]
    v = v_pages[page].astype(jnp.float32)
    v = jnp.where(seen[:, None, :, None], v, 0)
    scores = _capped(jnp.einsum('skgh,skph->skgp', q, k), soft_cap)
    scores = jnp.where(seen[:, None, None, :], scores, _MASKED)
    return _fold(state, scores, v,
                 functools.partial(jnp.einsum, 'skgp,skph->skgh'))

  init = (jnp.zeros_like(q), jnp.full(q.shape[:3], _MASKED, jnp.float32),
          jnp.zeros(q.shape[:3], jnp.float32))
  acc, _, total = lax.fori_loop(
    first, (stop.max() + page_size - 1) // page_size, column, init)
  return acc / total[..., None]


def _chunks(out, q, k_pages, v_pages, kv_lens, page_indices, cu_q_lens,
            distribution, *, sliding_window, soft_cap):
  page_size = k_pages.shape[2]
  q = jnp.pad(q, ((0, _TILE), (0, 0), (0, 0), (0, 0)))

  def sequence(s, out):
    q_start, q_len = cu_q_lens[s], cu_q_lens[s + 1] - cu_q_lens[s]
    offset = kv_lens[s] - q_len

    def tile(t, out):
      row = q_start + t * _TILE
      qt = lax.dynamic_slice_in_dim(q, row, _TILE)
      q_at = offset + t * _TILE + jnp.arange(_TILE)
      stop = jnp.minimum(offset + (t + 1) * _TILE, kv_lens[s])
      first = 0 if sliding_window is None else jnp.maximum(
        q_at[0] - sliding_window + 1, 0) // page_size

      def page_step(c, state):
        page = page_indices[s, c]
        at = c * page_size + jnp.arange(page_size)
        k = k_pages[page].astype(jnp.float32)
        v = jnp.where((at < stop)[:, None],
                      v_pages[page].astype(jnp.float32), 0)
        scores = _capped(jnp.einsum('tkgh,kph->kgtp', qt, k), soft_cap)
        seen = at[None, :] <= q_at[:, None]
        if sliding_window is not None:
          seen &= at[None, :] > q_at[:, None] - sliding_window
        scores = jnp.where(seen, scores, _MASKED)
        return _fold(state, scores, v,
                     functools.partial(jnp.einsum, 'kgtp,kph->kgth'))

      shape = (q.shape[1], q.shape[2], _TILE)
      init = (jnp.zeros((*shape, q.shape[3]), jnp.float32),
              jnp.full(shape, _MASKED, jnp.float32),
              jnp.zeros(shape, jnp.float32))
      acc, _, total = lax.fori_loop(
        first, (stop + page_size - 1) // page_size, page_step, init)
      result = (acc / total[..., None]).transpose(2, 0, 1, 3)
      return lax.dynamic_update_slice_in_dim(out, result, row, 0)

    return lax.fori_loop(0, (q_len + _TILE - 1) // _TILE, tile, out)

  return lax.fori_loop(distribution[0], distribution[1], sequence, out)
