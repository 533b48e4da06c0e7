# SPDX-License-Identifier: Apache-2.0
"""Cuts a hybrid batch into work for the blocks of a GPU.

The rows of a sequence are its (query, head of a group) pairs, row = query *
group + head: heads that share keys fill a matmul's tile together. A work item
is a tile of rows against a range of key blocks, done for every KV head.

A small sequence, usually a decode, has few rows and waits for memory. It gets
narrow tiles, and long contexts are split, so that all of the GPU reads. The
splits' results are partial, and a second kernel merges them. The other
sequences, chunks of prefills, get wide tiles. Items are ordered longest first,
so that no long one is left when the others are done.

All arrays have fixed shapes, and all arithmetic is in whole arrays, so that
the same code runs on the host (NumPy) and in a traced step (jax.numpy). This
is the plan of FlashInfer's scheduler (arXiv 2501.01005, section 3.3), with
splits of one size in place of its search.

`Any` is an array here: np.ndarray or jax.Array; `xp` is NumPy or jax.numpy.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np

NO_SLOT = -1


@dataclasses.dataclass(frozen=True, slots=True)
class Tiling:
  """The sizes by which work is cut.

  Attributes:
    wide_rows: rows of a tile of a prefill.
    narrow_rows: rows of a tile of a decode.
    block_n: keys of a block.
    num_items: the least items that keep a GPU busy; splits aim at it.
    min_split: the least key blocks of a split.
    has_wide: whether there are wide tiles; if not, another kernel does
      prefills (see `make_chunks`).
    has_narrow: whether there are narrow tiles; if not, all are wide, of which
      none is split, so that no row's sums depend on the batch.
  """

  wide_rows: int
  narrow_rows: int
  block_n: int
  num_items: int
  min_split: int = 4
  has_wide: bool = True
  has_narrow: bool = True

  @property
  def row_counts(self) -> tuple[int, ...]:
    """The numbers of rows that tiles have."""
    return (
      *([self.wide_rows] if self.has_wide else ()),
      *([self.narrow_rows] if self.has_narrow else ()),
    )

  def num_narrow(self, num_tokens: int, num_seqs: int, group: int) -> int:
    """Returns the most tiles of small sequences in a batch."""
    return min(num_seqs, num_tokens) * -(-group // self.narrow_rows)

  def num_work_items(self, num_tokens: int, num_seqs: int, group: int) -> int:
    """Returns the most work items of a batch."""
    wide = self.has_wide * (
      num_tokens * group // self.wide_rows + min(num_seqs, num_tokens)
    )
    return self.num_narrow(num_tokens, num_seqs, group) + self.num_items + wide


class Plan(NamedTuple):
  """The work of a batch: int32 arrays of W items and M narrow tiles.

  Attributes:
    rows: [W], rows of the item's tile: Tiling.wide_rows, narrow_rows, or 0 for
      padding. Items are ordered longest first.
    seq: [W], the sequence.
    first_row: [W], first row of the tile, in the sequence's rows.
    start, stop: [W], the key blocks [start, stop) of the sequence.
    slot: [W], where the partial result goes; NO_SLOT if the result is whole.
    merge_seq, merge_row: [M], sequences of the narrow tiles, and first rows.
    merge_slot, merge_count: [M], a tile's partial results lie at slots
      [merge_slot, merge_slot + merge_count); a count of 0: none to merge.
  """

  rows: Any
  seq: Any
  first_row: Any
  start: Any
  stop: Any
  slot: Any
  merge_seq: Any
  merge_row: Any
  merge_slot: Any
  merge_count: Any


def make(
  kv_lens: Any,
  cu_q_lens: Any,
  distribution: Any,
  *,
  tiling: Tiling,
  num_tokens: int,
  group: int,
  sliding_window: int | None = None,
  xp: Any = np,
) -> Plan:
  """Plans a batch; arguments as of `api.ragged_paged_attention`.

  Worked example: group=4, narrow_rows=16, wide_rows=64, block_n=64,
  num_items=4, min_split=4; a decode at 1024 keys, a chunk of 20 tokens after
  100. The decode's 16 blocks make 4 splits of 4, of rows [0, 4); the chunk's
  80 rows make two wide tiles, of 2 blocks each.
  """
  num_seqs = kv_lens.shape[0]
  q_lens, is_small = _q_lens(
    cu_q_lens, distribution, tiling.narrow_rows // group, xp
  )
  if not tiling.has_narrow:
    is_small = xp.zeros_like(is_small)
  tile_rows = xp.where(is_small, tiling.narrow_rows, tiling.wide_rows)
  tiles = _ceil(q_lens * group, tile_rows)
  if not tiling.has_wide:
    tiles = xp.where(is_small, tiles, 0)
  first_block, last_block = _block_range(
    kv_lens - q_lens, kv_lens, tiling.block_n, sliding_window, xp
  )
  blocks = last_block - first_block
  narrow_tiles = xp.where(is_small, tiles, 0)
  size = xp.maximum(
    _ceil(xp.sum(blocks * narrow_tiles), tiling.num_items), tiling.min_split
  )
  splits = xp.where(is_small, xp.maximum(_ceil(blocks, size), 1), 1)

  # Narrow items first, so that an item's place is its slot.
  num_items = tiling.num_work_items(num_tokens, num_seqs, group)
  narrow, num_narrow = _expand(narrow_tiles * splits, num_items, xp)
  wide, num_wide = _expand(tiles - narrow_tiles, num_items, xp)
  item = xp.arange(num_items)
  is_narrow = item < num_narrow
  is_wide = ~is_narrow & (item < num_narrow + num_wide)
  at = xp.maximum(item - num_narrow, 0)
  seq = xp.where(is_narrow, narrow.seq, wide.seq[at])
  place = xp.where(is_narrow, narrow.place, wide.place[at])
  tile, split = place // splits[seq], place % splits[seq]
  first_row = tile * tile_rows[seq]
  # The tile's own keys: a wide tile need not see all that its chunk does.
  past = kv_lens[seq] - q_lens[seq]
  first_query = first_row // group
  last_query = xp.minimum(
    (first_row + tile_rows[seq] - 1) // group, q_lens[seq] - 1
  )
  start, stop = _block_range(
    past + first_query,
    past + last_query + 1,
    tiling.block_n,
    sliding_window,
    xp,
  )
  start = xp.where(is_narrow, first_block[seq] + split * size, start)
  stop = xp.where(is_narrow, xp.minimum(start + size, last_block[seq]), stop)
  real = is_narrow | is_wide
  item_rows = xp.where(real, tile_rows[seq], 0)
  cost = xp.where(real, (stop - start) * item_rows, -1)
  order = xp.argsort(-cost, stable=True)
  slot = xp.where(is_narrow & (splits[seq] > 1), item, NO_SLOT)

  merge, num_merges = _expand(
    narrow_tiles, tiling.num_narrow(num_tokens, num_seqs, group), xp
  )
  before = xp.cumsum(narrow_tiles * splits) - narrow_tiles * splits
  count = splits[merge.seq]
  to_merge = (xp.arange(merge.seq.shape[0]) < num_merges) & (count > 1)
  columns = (item_rows, seq, first_row, start, stop, slot)
  return Plan(
    *(
      x.astype(np.int32)
      for x in (
        *(column[order] for column in columns),
        merge.seq,
        merge.place * tiling.narrow_rows,
        before[merge.seq] + merge.place * count,
        xp.where(to_merge, count, 0),
      )
    )
  )


class Chunks(NamedTuple):
  """Tiles of the chunks of prefills: int32 arrays of W tiles, longest first.

  Attributes:
    seq: [W], the sequence.
    first_query: [W], first query of the tile, in the sequence.
    start, stop: [W], the key blocks [start, stop) of the sequence.
    count: [1], the number of real tiles; the rest is padding.
  """

  seq: Any
  first_query: Any
  start: Any
  stop: Any
  count: Any


def make_chunks(
  kv_lens: Any,
  cu_q_lens: Any,
  distribution: Any,
  *,
  tile: int,
  block_n: int,
  small: int,
  num_tokens: int,
  sliding_window: int | None = None,
  xp: Any = np,
) -> Chunks:
  """Cuts what a plan without wide tiles leaves out into tiles of queries.

  Args:
    kv_lens, cu_q_lens, distribution: as of `api.ragged_paged_attention`.
    tile: queries of a tile, each with all of its heads.
    block_n: keys of a block.
    small: the most queries that make a sequence small, beside decodes: the
      other plan's Tiling.narrow_rows // group.
    num_tokens: T.
    sliding_window: as of `api.ragged_paged_attention`.
    xp: NumPy or jax.numpy.
  """
  num_seqs = kv_lens.shape[0]
  q_lens, is_small = _q_lens(cu_q_lens, distribution, small, xp)
  tiles = xp.where(is_small, 0, _ceil(q_lens, tile))
  (seq, place), count = _expand(
    tiles, num_tokens // tile + min(num_seqs, num_tokens), xp
  )
  first = place * tile
  past = kv_lens[seq] - q_lens[seq]
  start, stop = _block_range(
    past + first,
    past + xp.minimum(first + tile, q_lens[seq]),
    block_n,
    sliding_window,
    xp,
  )
  cost = xp.where(xp.arange(len(seq)) < count, stop - start, -1)
  order = xp.argsort(-cost, stable=True)
  columns = [column[order] for column in (seq, first, start, stop)]
  return Chunks(*(x.astype(np.int32) for x in (*columns, count.reshape(1))))


def _q_lens(
  cu_q_lens: Any, distribution: Any, small: int, xp: Any
) -> tuple[Any, Any]:
  """Returns the queries of each sequence, and which get narrow tiles, [S] each.

  Padding has 0 queries.
  """
  place = xp.arange(cu_q_lens.shape[0] - 1)
  q_lens = xp.where(place < distribution[1], cu_q_lens[1:] - cu_q_lens[:-1], 0)
  return q_lens, (q_lens <= small) | (place < distribution[0])


class _Expanded(NamedTuple):
  """Repeated rows: row `seq` for the `place`-th time, [size] each."""

  seq: Any
  place: Any


def _expand(counts: Any, size: int, xp: Any) -> tuple[_Expanded, Any]:
  """Repeats row i counts[i] times, padded to [size]; counts the real rows.

  Worked example: counts=[2, 0, 1] -> seq [0, 0, 2, ...], place [0, 1, 0, ...],
  and 3.
  """
  ends = xp.cumsum(counts)
  index = xp.arange(size)
  # searchsorted would be a loop when traced, which ends a GPU's CUDA graph.
  seq = xp.sum(ends[None, :] <= index[:, None], axis=1)
  seq = xp.minimum(seq, counts.shape[0] - 1)
  return _Expanded(seq, index - (ends - counts)[seq]), ends[-1]


def _block_range(
  first: Any, stop: Any, block_n: int, sliding_window: int | None, xp: Any
) -> tuple[Any, Any]:
  """Returns the key blocks [start, stop) that queries at [first, stop) see."""
  oldest = (
    first * 0
    if sliding_window is None
    else (xp.maximum(first - sliding_window + 1, 0))
  )
  return oldest // block_n, _ceil(stop, block_n)


def _ceil(x: Any, y: Any) -> Any:
  return -(-x // y)
