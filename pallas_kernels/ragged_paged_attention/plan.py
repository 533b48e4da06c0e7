# SPDX-License-Identifier: Apache-2.0
"""Cuts a hybrid batch into work for the blocks of a GPU.

The rows of a sequence are its (query, head of a group) pairs, row = query *
group + head: heads that share keys fill a matmul's tile together. A work item
is a tile of rows against a range of key blocks, done for every KV head.

A small sequence, a decode as a rule, has few rows and waits for memory: it
gets narrow tiles, and long contexts are split, so that all of the GPU reads.
The splits' results are partial, and a second kernel merges them. The other
sequences, chunks of prefills, get wide tiles of their rows. Items are ordered
longest first, so that none is left over when the others are done.

All arrays have fixed shapes, and all arithmetic is in whole arrays, so that
the same code runs on the host (NumPy) and in a traced step (jax.numpy). It is
the plan of FlashInfer's scheduler (arXiv 2501.01005, section 3.3), with
splits of one size in place of its search.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np

NO_SLOT = -1


@dataclasses.dataclass(frozen=True, slots=True)
class Tiling:
  """How work is cut.

  Attributes:
    wide_rows: rows of a tile of a prefill.
    narrow_rows: rows of a tile of a decode.
    block_n: keys of a block; divides the page size.
    num_items: items, at least, that keep a GPU busy; splits aim at them.
    min_split: key blocks of a split, at least.
  """

  wide_rows: int
  narrow_rows: int
  block_n: int
  num_items: int
  min_split: int = 4

  def num_narrow(self, num_tokens: int, num_seqs: int, group: int) -> int:
    """The most tiles of small sequences in a batch."""
    return min(num_seqs, num_tokens) * -(-group // self.narrow_rows)

  def num_work_items(self, num_tokens: int, num_seqs: int, group: int) -> int:
    """The most work items of a batch."""
    wide = num_tokens * group // self.wide_rows + min(num_seqs, num_tokens)
    return (self.num_narrow(num_tokens, num_seqs, group) + self.num_items
            + wide)


class Plan(NamedTuple):
  """Work of a batch, int32. All items' arrays are [W], longest first.

  Attributes:
    rows: of the item's tile: Tiling.wide_rows, narrow_rows, or 0 for padding.
    seq: whose.
    first_row: of the tile, in the sequence's rows.
    start, stop: the key blocks [start, stop) of the sequence.
    slot: where the partial result goes; NO_SLOT if the item is all there is.
    merge_seq, merge_row: [M] the narrow tiles, and their first rows.
    merge_slot, merge_count: [M] a tile's partial results lie at slots
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
  live = xp.arange(num_seqs) < distribution[1]
  q_lens = xp.where(live, cu_q_lens[1:] - cu_q_lens[:-1], 0)
  rows = q_lens * group
  is_small = (rows <= tiling.narrow_rows) | (
    xp.arange(num_seqs) < distribution[0])
  tile_rows = xp.where(is_small, tiling.narrow_rows, tiling.wide_rows)
  tiles = xp.where(live, _ceil(rows, tile_rows), 0)
  first_block, last_block = _block_range(
    kv_lens - q_lens, kv_lens, tiling.block_n, sliding_window, xp)
  blocks = last_block - first_block
  narrow_tiles = xp.where(is_small, tiles, 0)
  size = xp.maximum(_ceil(xp.sum(blocks * narrow_tiles), tiling.num_items),
                    tiling.min_split)
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
    (first_row + tile_rows[seq] - 1) // group, q_lens[seq] - 1)
  start, stop = _block_range(past + first_query, past + last_query + 1,
                             tiling.block_n, sliding_window, xp)
  start = xp.where(is_narrow, first_block[seq] + split * size, start)
  stop = xp.where(is_narrow, xp.minimum(start + size, last_block[seq]), stop)
  real = is_narrow | is_wide
  item_rows = xp.where(real, tile_rows[seq], 0)
  cost = xp.where(real, (stop - start) * item_rows, -1)
  order = xp.argsort(-cost, stable=True)
  slot = xp.where(is_narrow & (splits[seq] > 1), item, NO_SLOT)

  merge, num_merges = _expand(
    narrow_tiles, tiling.num_narrow(num_tokens, num_seqs, group), xp)
  before = xp.cumsum(narrow_tiles * splits) - narrow_tiles * splits
  count = splits[merge.seq]
  to_merge = (xp.arange(merge.seq.shape[0]) < num_merges) & (count > 1)
  columns = (item_rows, seq, first_row, start, stop, slot)
  return Plan(*(
    x.astype(np.int32) for x in (
      *(column[order] for column in columns),
      merge.seq, merge.place * tiling.narrow_rows,
      before[merge.seq] + merge.place * count,
      xp.where(to_merge, count, 0))))


class _Expanded(NamedTuple):
  """Rows repeated: row `seq` for the `place`-th time."""

  seq: Any
  place: Any


def _expand(counts: Any, size: int, xp: Any) -> tuple[_Expanded, Any]:
  """Repeats row i counts[i] times, [size]; and how many these are.

  counts [2, 0, 1] -> seq [0, 0, 2, ...], place [0, 1, 0, ...], 3
  """
  ends = xp.cumsum(counts)
  index = xp.arange(size)
  # Not searchsorted: traced, it is a loop, which ends a GPU's graph of kernels.
  seq = xp.sum(ends[None, :] <= index[:, None], axis=1)
  seq = xp.minimum(seq, counts.shape[0] - 1)
  return _Expanded(seq, index - (ends - counts)[seq]), ends[-1]


def _block_range(first: Any, stop: Any, block_n: int,
                 sliding_window: int | None, xp: Any) -> tuple[Any, Any]:
  """The key blocks that queries at positions [first, stop) see."""
  oldest = first * 0 if sliding_window is None else (
    xp.maximum(first - sliding_window + 1, 0))
  return oldest // block_n, _ceil(stop, block_n)


def _ceil(x: Any, y: Any) -> Any:
  return -(-x // y)
