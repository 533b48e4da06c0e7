# SPDX-License-Identifier: Apache-2.0
"""Cuts a hybrid batch into work for the blocks of a GPU.

The rows of a sequence are its (query, head of a group) pairs, row = query *
group + head: heads that share keys fill a matmul's tile together. A work item
is a tile of rows against a range of key blocks, done for every KV head.

A small sequence, usually a decode, has few rows and waits for memory. It gets
tiles of few rows, and long contexts are split, so that all of the GPU reads.
The splits' results are partial, and a second kernel merges them. The other
sequences, chunks of prefills, wait for matmuls: their tiles have many rows.
Items are ordered longest first, so that no long one is left when the others
are done.

All arrays have fixed shapes, and all arithmetic is in whole arrays, so that
the same code runs on the host (NumPy) and in a traced step (jax.numpy). This
is the plan of FlashInfer's scheduler (arXiv 2501.01005, section 3.3), with
splits of about one size in place of its search.

`Any` is an array here: np.ndarray or jax.Array; `xp` is NumPy or jax.numpy.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np

NO_SLOT = -1


@dataclasses.dataclass(frozen=True, slots=True)
class Tiling:
  """How small sequences are cut.

  Attributes:
    rows: rows of a tile.
    block_n: keys of a block.
    num_items: the items that keep a GPU busy; splits aim at it.
    min_split: the least key blocks of a split.
  """

  rows: int
  block_n: int
  num_items: int
  min_split: int = 2

  def most_queries(self, group: int) -> int:
    """Returns how many queries a small sequence has at most."""
    return self.rows // group

  def num_tiles(self, num_tokens: int, num_seqs: int, group: int) -> int:
    """Returns the most tiles of a batch."""
    return min(num_seqs, num_tokens) * _ceil(group, self.rows)

  def num_work_items(self, num_tokens: int, num_seqs: int, group: int) -> int:
    """Returns the most work items of a batch."""
    return self.num_tiles(num_tokens, num_seqs, group) + self.num_items

  def num_merges(self, num_tokens: int, num_seqs: int, group: int) -> int:
    """Returns the most tiles that are split: each has more blocks than a
    split, of which all tiles together have `num_items`."""
    return min(self.num_tiles(num_tokens, num_seqs, group), self.num_items)


class Small(NamedTuple):
  """The work of small sequences: int32 arrays of W items and M split tiles.

  Attributes:
    seq: [W], the sequence. Items are ordered longest first.
    first_row: [W], first row of the tile, in the sequence's rows.
    start, stop: [W], the key blocks [start, stop) of the sequence.
    slot: [W], where the partial result goes; NO_SLOT if the result is whole.
    count: [1], the number of real items; the rest is padding.
    merge_seq, merge_row: [M], sequences of the split tiles, and first rows.
    merge_slot, merge_count: [M], a tile's partial results lie at slots
      [merge_slot, merge_slot + merge_count).
    num_merges: [1], the number of split tiles; the rest is padding.
  """

  seq: Any
  first_row: Any
  start: Any
  stop: Any
  slot: Any
  count: Any
  merge_seq: Any
  merge_row: Any
  merge_slot: Any
  merge_count: Any
  num_merges: Any


class Chunks(NamedTuple):
  """Tiles of the chunks of prefills: int32 arrays of W tiles, longest first.

  Attributes:
    seq: [W], the sequence.
    first_row: [W], first row of the tile, in the sequence's rows.
    start, stop: [W], the key blocks [start, stop) of the sequence.
    count: [1], the number of real tiles; the rest is padding.
  """

  seq: Any
  first_row: Any
  start: Any
  stop: Any
  count: Any


class Plan(NamedTuple):
  """The work of a batch.

  Attributes:
    small: of small sequences; None where all are cut as chunks are, so that no
      row's sums depend on the batch.
    chunks: of the others; None where there are none.
  """

  small: Small | None
  chunks: Chunks | None


def make_small(
  kv_lens: Any,
  cu_q_lens: Any,
  distribution: Any,
  *,
  tiling: Tiling,
  num_tokens: int,
  group: int,
  sliding_window: int | None = None,
  xp: Any = np,
) -> Small:
  """Plans small sequences; arguments as of `api.ragged_paged_attention`.

  Worked example: group=4, rows=16, block_n=64, num_items=4, min_split=2; a
  decode at 1024 keys. Its 16 blocks make 4 splits of 4, of rows [0, 4).
  """
  num_seqs = kv_lens.shape[0]
  q_lens, is_small = _q_lens(
    cu_q_lens, distribution, tiling.most_queries(group), xp
  )
  tiles = xp.where(is_small, _ceil(q_lens * group, tiling.rows), 0)
  first_block, last_block = _block_range(
    kv_lens - q_lens, kv_lens, tiling.block_n, sliding_window, xp
  )
  blocks = last_block - first_block
  size = xp.maximum(
    _ceil(xp.sum(blocks * tiles), tiling.num_items), tiling.min_split
  )
  splits = xp.maximum(_ceil(blocks, size), 1)
  # As long as each other, so that none is left when the others are done.
  size = xp.maximum(_ceil(blocks, splits), 1)
  splits = xp.maximum(_ceil(blocks, size), 1)

  (seq, place), count = _expand(
    tiles * splits, tiling.num_work_items(num_tokens, num_seqs, group), xp
  )
  item = xp.arange(len(seq))  # an item's place is its slot
  tile, split = place // splits[seq], place % splits[seq]
  start = first_block[seq] + split * size[seq]
  stop = xp.minimum(start + size[seq], last_block[seq])
  slot = xp.where(splits[seq] > 1, item, NO_SLOT)
  columns = (seq, tile * tiling.rows, start, stop, slot)
  order = _longest_first(start, stop, count, xp)

  (merged, place), num_merges = _expand(
    xp.where(splits > 1, tiles, 0),
    tiling.num_merges(num_tokens, num_seqs, group),
    xp,
  )
  before = xp.cumsum(tiles * splits) - tiles * splits
  return Small(
    *_as_int32(
      *(column[order] for column in columns),
      count,
      merged,
      place * tiling.rows,
      before[merged] + place * splits[merged],
      splits[merged],
      num_merges,
    )
  )


def make_chunks(
  kv_lens: Any,
  cu_q_lens: Any,
  distribution: Any,
  *,
  rows: int,
  block_n: int,
  small: int | None,
  num_tokens: int,
  group: int,
  sliding_window: int | None = None,
  xp: Any = np,
) -> Chunks:
  """Cuts what is not small into tiles.

  Worked example: group=4, rows=64, block_n=64; a chunk of 20 tokens after 100.
  Its 80 rows make two tiles, of 2 blocks each.

  Args:
    kv_lens, cu_q_lens, distribution: as of `api.ragged_paged_attention`.
    rows: of a tile.
    block_n: keys of a block.
    small: the most queries that make a sequence small, beside decodes; None:
      no sequence is, nor are decodes.
    num_tokens: T.
    group: rows of a query.
    sliding_window: as of `api.ragged_paged_attention`.
    xp: NumPy or jax.numpy.
  """
  num_seqs = kv_lens.shape[0]
  q_lens, is_small = _q_lens(cu_q_lens, distribution, small, xp)
  tiles = xp.where(is_small, 0, _ceil(q_lens * group, rows))
  (seq, place), count = _expand(
    tiles, num_chunks(rows, num_tokens, num_seqs, group), xp
  )
  first_row = place * rows
  past = kv_lens[seq] - q_lens[seq]
  # The tile's own keys: it need not see all that its chunk does.
  last_query = xp.minimum((first_row + rows - 1) // group, q_lens[seq] - 1)
  start, stop = _block_range(
    past + first_row // group,
    past + last_query + 1,
    block_n,
    sliding_window,
    xp,
  )
  order = _longest_first(start, stop, count, xp)
  columns = (column[order] for column in (seq, first_row, start, stop))
  return Chunks(*_as_int32(*columns, count))


def num_chunks(rows: int, num_tokens: int, num_seqs: int, group: int) -> int:
  """Returns the most tiles of `make_chunks`."""
  return num_tokens * group // rows + min(num_seqs, num_tokens)


def _longest_first(start: Any, stop: Any, count: Any, xp: Any) -> Any:
  """Returns the order of items; the `count` real ones come first."""
  cost = xp.where(xp.arange(len(start)) < count, stop - start, -1)
  return xp.argsort(-cost, stable=True)


def _as_int32(*arrays: Any) -> list[Any]:
  """Returns arrays as int32, numbers as [1]."""
  return [x.astype(np.int32).reshape(x.shape or 1) for x in arrays]


def _q_lens(
  cu_q_lens: Any, distribution: Any, small: int | None, xp: Any
) -> tuple[Any, Any]:
  """Returns the queries of each sequence, and which are small, [S] each.

  Padding has 0 queries. Of `small` see `make_chunks`.
  """
  place = xp.arange(cu_q_lens.shape[0] - 1)
  q_lens = xp.where(place < distribution[1], cu_q_lens[1:] - cu_q_lens[:-1], 0)
  if small is None:
    return q_lens, xp.zeros_like(place, bool)
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
