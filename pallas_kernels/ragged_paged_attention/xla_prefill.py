# SPDX-License-Identifier: Apache-2.0
"""Chunks of prefills in plain JAX: matmuls, bound by arithmetic.

A chunk's queries are cut into tiles. One tile after another attends to the
pages before it, a few pages at once, with the online softmax. Everything is
transposed, with queries side by side, so that sums and maxima over keys are of
whole vectors.
"""

from __future__ import annotations

import jax
from jax import lax
import jax.numpy as jnp

from pallas_kernels import unpacking
from pallas_kernels.ragged_paged_attention import batch as batch_lib
from pallas_kernels.ragged_paged_attention import layout
from pallas_kernels.ragged_paged_attention import quantization

_MASKED = -1e30  # finite: the difference of two of them is no NaN
_TILE = 64  # queries
_SMALL_TILE = 16  # of few that are left, and all where batches don't matter
_BLOCK = 64  # keys, in whole pages


def chunks(
  out: jax.Array,  # [T, K, G, h], float32
  q: jax.Array,  # [T, K, G, h], float32 and scaled
  k_pages: quantization.Pages,  # [N, K, page_size / l, h, l]
  v_pages: quantization.Pages,  # [N, K, h / l, page_size, l]
  batch: batch_lib.Batch,
  options: batch_lib.Options,
  sinks: jax.Array | None = None,  # [K, G], float32
) -> jax.Array:
  """Returns `out` with the rows of the chunks set."""
  kv_lens, page_indices, cu_q_lens, distribution = batch
  sliding_window = options.sliding_window
  num_tokens, num_kv_heads, group, head_dim = q.shape
  small = min(_SMALL_TILE, num_tokens)
  large = small if options.batch_invariant else min(_TILE, num_tokens)
  page_size = layout.sizes(k_pages)[2]
  per_block = min(max(_BLOCK // page_size, 1), page_indices.shape[1])
  block_size = per_block * page_size
  tables = jnp.pad(page_indices, ((0, 0), (0, per_block)))

  def tile(
    size: int, s: jax.Array, row: jax.Array, out: jax.Array
  ) -> jax.Array:
    """Sets the chunk's rows from `row` on, at most `size`."""
    # No tile may reach beyond the batch: the last one starts earlier, with
    # rows of other sequences.
    start = jnp.minimum(row, num_tokens - size)
    rows = start + jnp.arange(size)
    queries = lax.dynamic_slice_in_dim(q, start, size)
    queries = queries.transpose(1, 3, 2, 0).reshape(
      num_kv_heads, head_dim, group * size
    )
    at = row + kv_lens[s] - cu_q_lens[s + 1]  # position of `row`
    stop = jnp.minimum(at + size, kv_lens[s])
    q_at = jnp.tile(at + rows - row, group)[None]
    first = (
      0
      if sliding_window is None
      else (jnp.maximum(at - sliding_window + 1, 0) // block_size)
    )

    def block(b: jax.Array, state: tuple[jax.Array, ...]):
      acc, top, norm = state
      k_at = (b * block_size + jnp.arange(block_size))[:, None]
      used = k_at[::page_size, 0] < stop
      pages = jnp.where(
        used,
        lax.dynamic_slice(tables, (s, b * per_block), (1, per_block))[0],
        0,
      )
      k = _keys(k_pages, pages)
      kept = k_at < stop
      if sliding_window is not None:  # Pages before it may be others' by now.
        kept &= k_at > at - sliding_window
      v = jnp.where(kept.T[None], _values(v_pages, pages), 0)
      scores = jnp.einsum('kph,kht->kpt', k, queries)
      if (cap := options.soft_cap) is not None:
        scores = cap * jnp.tanh(scores / cap)
      seen = k_at <= q_at
      if sliding_window is not None:
        seen &= k_at > q_at - sliding_window
      scores = jnp.where(seen[None], scores, _MASKED)
      new_top = jnp.maximum(top, scores.max(1))
      decay = jnp.exp(top - new_top)
      weights = jnp.exp(scores - new_top[:, None])
      return (
        acc * decay[:, None] + jnp.einsum('khp,kpt->kht', v, weights),
        new_top,
        norm * decay + weights.sum(1),
      )

    acc, top, norm = lax.fori_loop(
      first,
      (stop + block_size - 1) // block_size,
      block,
      (
        jnp.zeros_like(queries),
        jnp.full(queries.shape[::2], _MASKED, jnp.float32),
        jnp.zeros(queries.shape[::2], jnp.float32),
      ),
    )
    if sinks is not None:
      norm += jnp.exp(jnp.repeat(sinks, size, axis=1) - top)
    new = (
      (acc / norm[:, None])
      .reshape(num_kv_heads, head_dim, group, size)
      .transpose(3, 0, 2, 1)
    )
    mine = (rows >= row) & (rows < cu_q_lens[s + 1])
    old = lax.dynamic_slice_in_dim(out, start, size)
    return lax.dynamic_update_slice_in_dim(
      out, jnp.where(mine[:, None, None, None], new, old), start, 0
    )

  def tiles(
    size: int, s: jax.Array, row: jax.Array, count: jax.Array, out: jax.Array
  ) -> jax.Array:
    return lax.fori_loop(
      0, count, lambda t, out: tile(size, s, row + t * size, out), out
    )

  def chunk(s: jax.Array, out: jax.Array) -> jax.Array:
    first, stop = cu_q_lens[s], cu_q_lens[s + 1]
    # A few rows that are left take a small tile: prompts often go on from what
    # is cached by a few tokens.
    rest = (stop - first) % large
    num_small = ((rest > 0) & (rest <= small)).astype(jnp.int32)
    num_large = (stop - first + large - 1) // large - num_small
    if small == large:
      return tiles(small, s, first, num_large + num_small, out)
    out = tiles(large, s, first, num_large, out)
    return tiles(small, s, first + num_large * large, num_small, out)

  return lax.fori_loop(distribution[0], distribution[1], chunk, out)


def _keys(k_pages: quantization.Pages, pages: jax.Array) -> jax.Array:
  """Returns keys of some pages, [K, len(pages) * page_size, h] float32."""
  tiles = quantization.values_of(k_pages)[pages]
  tiles = tiles.transpose(1, 0, 2, 4, 3)  # [K, pages, tiles, l, h]
  keys = unpacking.decode(
    tiles.reshape(len(tiles), -1, tiles.shape[-1]), jnp.float32
  )
  return keys * _scales(k_pages, pages)[..., None]


def _values(v_pages: quantization.Pages, pages: jax.Array) -> jax.Array:
  """Returns values of some pages, [K, h, len(pages) * page_size] float32."""
  tiles = quantization.values_of(v_pages)[pages]
  tiles = tiles.transpose(1, 2, 4, 0, 3)  # [K, h / l, l, pages, page_size]
  heads, outer, lanes = tiles.shape[:3]
  values = unpacking.decode(
    tiles.reshape(heads, outer * lanes, -1), jnp.float32
  )
  return values * _scales(v_pages, pages)[:, None]


def _scales(pages: quantization.Pages, indices: jax.Array) -> jax.Array:
  """Returns scales of some pages, [K, len(indices) * page_size] float32.

  Returns ones, [1, 1], where pages are not quantized.
  """
  if not isinstance(pages, quantization.Quantized):
    return jnp.ones((1, 1))
  scales = pages.scales[indices].swapaxes(0, 1)
  return scales.reshape(len(scales), -1)
