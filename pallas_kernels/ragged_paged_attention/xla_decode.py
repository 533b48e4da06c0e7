# SPDX-License-Identifier: Apache-2.0
"""Decodes in plain JAX: one query each of many sequences, bound by memory.

The pages in use, of all decodes, form one list of work items. A loop takes a
block of them each turn, so it is as long as the work and not as the longest
context. What makes it fast on XLA's CPU backend, as of JAX 0.10:

- No matmul: its operand, the gathered pages, would be written and read once
  more. `_mix` is an elementwise expression without a reduction, unrolled over
  the channels, which the compiler fuses with the gather and vectorizes.
- Gathers are indexed once per query head. XLA would not fuse them if they were
  read once and broadcast to the heads of a group.
- Each `_mix` stands in a conditional that is always taken. Without that wall,
  XLA fuses its neighbours and leaves the gathers out.
- Blocks are large enough for XLA to share each fusion among its threads; two
  loops would not run side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import functools
import operator

import jax
from jax import lax
import jax.numpy as jnp

from pallas_kernels import unpacking
from pallas_kernels.ragged_paged_attention import batch as batch_lib
from pallas_kernels.ragged_paged_attention import layout
from pallas_kernels.ragged_paged_attention import quantization

_MASKED = -1e30  # finite: the difference of two of them is no NaN
_BLOCK = 16  # work items, of a page each
_SMALL_BLOCK = 4  # of a single sequence: few enough for one thread
_SUMS = 4  # independent ones, since a chain of additions waits for each


def decodes(
  q: jax.Array,  # [D, K, G, h], float32 and scaled; D <= S
  k_pages: quantization.Pages,  # [N, K, page_size / l, h, l]
  v_pages: quantization.Pages,  # [N, K, h / l, page_size, l]
  batch: batch_lib.Batch,
  options: batch_lib.Options,
  sinks: jax.Array | None = None,  # [K, G], float32
) -> jax.Array:
  """Returns float32 [D, K, G, h]; rows from num_decodes on mean nothing."""
  num_seqs = q.shape[0]
  page_size = layout.sizes(k_pages)[2]
  k_values, v_values = map(quantization.values_of, (k_pages, v_pages))
  items, total = _work_items(
    batch.kv_lens[:num_seqs],
    batch.page_indices[:num_seqs],
    batch.distribution[0],
    page_size,
    options.sliding_window,
  )
  positions = jnp.arange(page_size, dtype=jnp.int32)[None]
  wall = total > 0

  def block(
    size: int, done: jax.Array, b: jax.Array, state: tuple[jax.Array, ...]
  ) -> tuple[jax.Array, ...]:
    seq, page, start, stop = (
      lax.dynamic_slice_in_dim(x, done + b * size, size) for x in items
    )
    # Items are in order, so a block's sequences are within as many rows.
    first = seq[0]
    rows = [lax.dynamic_slice_in_dim(x, first, size) for x in state]
    belongs = (seq - first)[None, :] == jnp.arange(size)[:, None]
    seen = (positions >= start[:, None]) & (positions < stop[:, None])
    scores = _walled(
      wall, _scores, q[jnp.minimum(seq, num_seqs - 1)], k_values, page
    )
    # A long last axis: exp is not vectorized over one of `l`.
    scores = scores.swapaxes(2, 3).reshape(size, *q.shape[1:3], -1)
    if isinstance(k_pages, quantization.Quantized):
      scores *= k_pages.scales[page][:, :, None]
    if (cap := options.soft_cap) is not None:
      scores = cap * jnp.tanh(scores / cap)
    scores = jnp.where(seen[:, None, None], scores, _MASKED)
    top = _row_max(belongs, scores.max(-1), rows[1])  # [block, K, G]
    item_top = top[jnp.minimum(seq - first, size - 1)]
    # Masked positions weigh 0, for an item sees at least one position. Padding
    # sees none, and adds nonsense to a row that nobody reads.
    weights = jnp.exp(scores - item_top[..., None])
    factors = weights
    if isinstance(v_pages, quantization.Quantized):
      factors *= jnp.where(seen[:, None], v_pages.scales[page], 0)[:, :, None]
    mixed = _walled(wall, _mixed, factors, v_values, page, seen)
    decay = jnp.exp(rows[1] - top)
    new = (
      rows[0] * decay[:, :, None, :, None] + _row_sum(belongs, mixed),
      top,
      rows[2] * decay + _row_sum(belongs, _marked(weights.sum(-1))),
    )
    return tuple(
      lax.dynamic_update_slice_in_dim(x, y, first, 0)
      for x, y in zip(state, new, strict=True)
    )

  rows, (num_kv_heads, group) = num_seqs + _BLOCK, q.shape[1:3]
  channels = v_values.shape[2], group, v_values.shape[4]
  state = (
    jnp.zeros((rows, num_kv_heads, *channels), jnp.float32),
    jnp.full((rows, num_kv_heads, group), _MASKED, jnp.float32),
    jnp.zeros((rows, num_kv_heads, group), jnp.float32),
  )
  done = jnp.int32(0)
  # A single sequence may have fewer pages than a block, so its rest is done in
  # small blocks. With many sequences the rest is not worth another loop.
  sizes = (_BLOCK, _SMALL_BLOCK) if num_seqs == 1 else (_BLOCK,)
  for size in sizes:
    left = total - done
    num = (left + size - 1 if size == sizes[-1] else left) // size
    state = lax.fori_loop(0, num, functools.partial(block, size, done), state)
    done += num * size
  acc, top, norm = state
  if sinks is not None:
    norm += jnp.exp(sinks[None] - top)
  out = acc[:num_seqs] / norm[:num_seqs, :, None, :, None]
  return out.swapaxes(2, 3).reshape(num_seqs, *q.shape[1:])


def _work_items(
  kv_lens: jax.Array,
  page_indices: jax.Array,
  num_decodes: jax.Array,
  page_size: int,
  sliding_window: int | None,
) -> tuple[tuple[jax.Array, ...], jax.Array]:
  """Lists the pages that decodes attend to, ordered by sequence.

  Worked example: page_size=4, kv_lens=[6, 3], page_indices=[[7, 2], [4, 0]]
  -> seq [0, 0, 1], page [7, 2, 4], start [0, -4, 0], stop [6, 2, 3].

  Returns:
    (seq, page, start, stop), each int32 [items], padded to whole blocks with
    seq S and start = stop = 0; in a page, positions [start, stop) are seen.
    And the number of real items.
  """
  num_seqs, pages = page_indices.shape
  live = jnp.arange(num_seqs) < num_decodes
  stop = jnp.where(live, kv_lens, 0)
  start = (
    jnp.zeros_like(stop)
    if sliding_window is None
    else (jnp.maximum(stop - sliding_window, 0))
  )
  first = start // page_size
  counts = jnp.where(live, (stop + page_size - 1) // page_size - first, 0)
  ends = jnp.cumsum(counts)
  size = -(-num_seqs * pages // _BLOCK) * _BLOCK
  item = jnp.arange(size, dtype=jnp.int32)
  seq = jnp.repeat(
    jnp.arange(num_seqs, dtype=jnp.int32), counts, total_repeat_length=size
  )
  column = item - (ends - counts)[seq] + first[seq]
  real = item < ends[-1]
  page = page_indices[seq, jnp.clip(column, 0, pages - 1)]
  return (
    jnp.where(real, seq, num_seqs),
    jnp.where(real, page, 0),
    jnp.where(real, start[seq] - column * page_size, 0),
    jnp.where(real, stop[seq] - column * page_size, 0),
  ), ends[-1]


def _scores(q: jax.Array, k_pages: jax.Array, page: jax.Array) -> jax.Array:
  """Computes q . k: [block, K, G, h] -> [block, K, page_size / l, G, l]."""
  return _mix([q[..., c] for c in range(q.shape[-1])], k_pages, page)


def _mixed(
  weights: jax.Array,  # [block, K, G, page_size]
  v_pages: jax.Array,
  page: jax.Array,
  seen: jax.Array,  # [block, page_size]
) -> jax.Array:
  """Returns the values, weighted and summed: [block, K, h / l, G, l]."""
  keep = -seen.astype(jnp.int32)  # all bits, or none
  columns = range(seen.shape[1])
  return _marked(
    _mix(
      [weights[..., c] for c in columns],
      v_pages,
      page,
      [keep[:, c] for c in columns],
    )
  )


def _mix(
  factors: Sequence[jax.Array],  # C of [block, K, G]
  pages: jax.Array,  # [N, K, A, C, l]
  page: jax.Array,  # [block]
  keep: Sequence[jax.Array] | None = None,  # C of [block]
) -> jax.Array:
  """Returns sum_c factors[c] * pages[page, :, :, c], [block, K, A, G, l].

  Does the heads of a group one after another at every tile. The tile is then
  in the nearest cache, and the loads of the next one overlap with them.

  Where keep[c] is 0, the number of the page is replaced by 0: it may be NaN.
  """
  num_kv_heads, num_tiles, _, lanes = pages.shape[1:]
  tiles = pages.reshape(-1, *pages.shape[3:])  # [N * K * A, C, l]
  per_page = num_kv_heads * num_tiles
  tile = page[:, None] * per_page + jnp.arange(per_page, dtype=jnp.int32)[None]
  tile = jnp.broadcast_to(
    tile.reshape(-1, num_kv_heads, num_tiles, 1, 1),
    (len(page), num_kv_heads, num_tiles, factors[0].shape[-1], 1),
  )
  numbers = lax.GatherDimensionNumbers(
    offset_dims=(4,), collapsed_slice_dims=(0,), start_index_map=(0,)
  )
  sums: list[jax.Array] = []
  for c, factor in enumerate(factors):
    x = lax.gather(
      tiles[:, c], tile, numbers, (1, lanes), mode='promise_in_bounds'
    )
    x = unpacking.decode(x, jnp.float32)
    if keep is not None:
      bits = lax.bitcast_convert_type(x, jnp.int32)
      bits &= keep[c][:, None, None, None, None]
      x = lax.bitcast_convert_type(bits, jnp.float32)
    x = factor[:, :, None, :, None] * x
    if c < _SUMS:
      sums.append(x)
    else:
      sums[c % _SUMS] += x
  return functools.reduce(operator.add, sums)


def _walled(
  wall: jax.Array,  # always true, which XLA does not know
  function: Callable[..., jax.Array],
  *args: jax.Array,
) -> jax.Array:
  """Returns function(*args), and keeps XLA from fusing it with its context."""
  out = jax.eval_shape(function, *args)
  return lax.cond(
    wall, function, lambda *_: jnp.zeros(out.shape, out.dtype), *args
  )


def _row_max(belongs: jax.Array, x: jax.Array, old: jax.Array) -> jax.Array:
  """Returns the highest of each row's items and its old value.

  Args:
    belongs: bool [rows, block], whether an item is of a row.
    x: [block, K, G], the items.
    old: [rows, K, G].
  """
  mine = jnp.where(belongs[:, :, None, None], x[None], _MASKED)
  return jnp.maximum(old, mine.max(1))


def _marked(x: jax.Array) -> jax.Array:
  """Marks the numbers that are not finite, or too large, for `_row_sum`.

  It multiplies other rows' items by 0, and 0 * NaN is NaN: a sequence whose
  values are NaN would ruin the others of its block.
  """
  return jnp.where(jnp.abs(x) <= 1e30, x, 1e37)


def _row_sum(belongs: jax.Array, x: jax.Array) -> jax.Array:
  """Sums each row's items, by a matmul, for scatters are slow on CPUs.

  Args:
    belongs: bool [rows, block], whether an item is of a row.
    x: [block, ...], the items, of `_marked`.
  """
  flat = x.reshape(len(x), -1)
  total = jnp.dot(belongs.astype(jnp.float32), flat, precision='highest')
  return jnp.where(total < 1e36, total, jnp.nan).reshape(x.shape)
