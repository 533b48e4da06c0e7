# SPDX-License-Identifier: Apache-2.0
"""A plan does all that is to be done, and does it once."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from typing import Any

import hypothesis
from hypothesis import strategies
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.ragged_paged_attention import plan as plan_lib

TILING = plan_lib.Tiling(rows=16, block_n=16, num_items=12, min_split=2)
ROWS = 32  # of a chunk's tile


def batch(
  contexts: list[int], q_lens: list[int], num_decodes: int, num_seqs: int = 8
) -> tuple[np.ndarray, ...]:
  kv_lens = np.zeros(num_seqs, np.int32)
  kv_lens[: len(contexts)] = contexts
  starts = np.full(num_seqs + 1, sum(q_lens), np.int32)
  starts[: len(q_lens) + 1] = np.concatenate(([0], np.cumsum(q_lens)))
  return kv_lens, starts, np.array([num_decodes, len(contexts)], np.int32)


def make(
  contexts: list[int],
  q_lens: list[int],
  num_decodes: int,
  group: int,
  window: int | None = None,
  num_seqs: int = 8,
  num_tokens: int = 64,
  is_apart: bool = True,
  xp=np,
) -> plan_lib.Plan:
  """Plans as `pallas_triton`; if not `is_apart`, all is cut as chunks are."""
  arrays = [
    xp.asarray(a) for a in batch(contexts, q_lens, num_decodes, num_seqs)
  ]
  options: Any = dict(
    num_tokens=num_tokens, group=group, sliding_window=window, xp=xp
  )
  return plan_lib.Plan(
    plan_lib.make_small(*arrays, tiling=TILING, **options)
    if is_apart
    else None,
    plan_lib.make_chunks(
      *arrays,
      rows=ROWS,
      block_n=TILING.block_n,
      small=TILING.most_queries(group) if is_apart else None,
      **options,
    ),
  )


def items_of(plan: plan_lib.Plan) -> Iterator[tuple[int, ...]]:
  """Yields rows, sequence, first row, start, stop and slot of each item."""
  if (small := plan.small) is not None:
    for i in range(int(small.count[0])):
      yield TILING.rows, *(int(column[i]) for column in small[:5])
  if (chunks := plan.chunks) is not None:
    for i in range(int(chunks.count[0])):
      item = (int(column[i]) for column in chunks[:4])
      yield ROWS, *item, plan_lib.NO_SLOT


def merged_of(small: plan_lib.Small | None) -> dict[int, tuple[int, int]]:
  """Returns the slots that are merged -> sequence and first row."""
  merged = {}
  for i in range(0 if small is None else int(small.num_merges[0])):
    assert small.merge_count[i] > 1, 'a merge of one'
    first = int(small.merge_slot[i])
    for slot in range(first, first + int(small.merge_count[i])):
      assert slot not in merged, 'a slot is merged twice'
      merged[slot] = int(small.merge_seq[i]), int(small.merge_row[i])
  return merged


def check(
  plan: plan_lib.Plan,
  contexts: list[int],
  q_lens: list[int],
  group: int,
  window: int | None,
) -> None:
  done: collections.Counter[tuple[int, int, int]] = collections.Counter()
  slots = {}
  for num_rows, seq, first, start, stop, slot in items_of(plan):
    rows = range(first, min(first + num_rows, q_lens[seq] * group))
    assert rows, 'a tile without rows'
    assert start < stop, 'an item without keys'
    for row in rows:
      for block in range(start, stop):
        done[seq, row, block] += 1
    if slot != plan_lib.NO_SLOT:
      assert slot not in slots, 'a slot is shared'
      slots[slot] = seq, first
  assert set(done.values()) <= {1}, 'keys are met twice'
  for seq, (context, q_len) in enumerate(zip(contexts, q_lens, strict=True)):
    for row in range(q_len * group):
      at = context - q_len + row // group
      oldest = 0 if window is None else max(at - window + 1, 0)
      for block in range(oldest // TILING.block_n, at // TILING.block_n + 1):
        assert (seq, row, block) in done, 'keys are left out'
  assert merged_of(plan.small) == slots, 'what is partial is merged, no more'
  for part in filter(None, plan):
    blocks = (part.stop - part.start)[: int(part.count[0])]
    assert (np.diff(blocks) <= 0).all(), 'longest first'


@pytest.mark.parametrize('is_apart', [True, False])
@pytest.mark.parametrize('window', [None, 1, 40])
@pytest.mark.parametrize('group', [1, 4, 7, 71])
@hypothesis.given(data=strategies.data())
@hypothesis.settings(max_examples=40)
def test_every_key_is_met_once(
  group: int, window: int | None, is_apart: bool, data: strategies.DataObject
) -> None:
  num_decodes = data.draw(strategies.integers(0, 8))
  q_lens = [1] * num_decodes + data.draw(
    strategies.lists(
      strategies.integers(1, 28), max_size=min(8 - num_decodes, 2)
    )
  )
  contexts = [n + data.draw(strategies.integers(0, 700)) for n in q_lens]
  plan = make(contexts, q_lens, num_decodes, group, window, is_apart=is_apart)
  check(plan, contexts, q_lens, group, window)
  if not is_apart:
    assert plan.small is None


def test_a_gap_is_noticed() -> None:
  """The check itself: it fails if an item ends a block too soon."""
  plan = make([400, 90], [1, 20], 1, 4)
  check(plan, [400, 90], [1, 20], 4, None)
  for name in ('small', 'chunks'):
    part = getattr(plan, name)
    shorter = part._replace(stop=part.stop - (part.stop - part.start > 1))
    with pytest.raises(AssertionError, match='left out'):
      check(plan._replace(**{name: shorter}), [400, 90], [1, 20], 4, None)


def test_the_worked_examples() -> None:
  arrays = np.array([1024, 120]), np.array([0, 1, 21]), np.array([1, 2])
  tiling = plan_lib.Tiling(rows=16, block_n=64, num_items=4)
  small = plan_lib.make_small(*arrays, tiling=tiling, num_tokens=21, group=4)
  count = int(small.count[0])
  items = zip(*(x[:count].tolist() for x in small[:5]), strict=True)
  assert list(items) == [
    (0, 0, 0, 4, 0),
    (0, 0, 4, 8, 1),
    (0, 0, 8, 12, 2),
    (0, 0, 12, 16, 3),
  ]
  assert (small.num_merges[0], small.merge_count[0]) == (1, 4)
  chunks = plan_lib.make_chunks(
    *arrays, rows=64, block_n=64, small=4, num_tokens=21, group=4
  )
  count = int(chunks.count[0])
  items = zip(*(x[:count].tolist() for x in chunks[:4]), strict=True)
  assert list(items) == [(1, 0, 0, 2), (1, 64, 0, 2)]


def test_decodes_fill_the_device() -> None:
  """A lone long context is split among all, evenly; many contexts are not."""
  alone = make([700], [1], 1, 4).small
  blocks = (alone.stop - alone.start)[: int(alone.count[0])]
  assert blocks.tolist() == [4] * (TILING.num_items - 1)  # of 44
  many = make([12] * 8, [1] * 8, 8, 4).small
  assert (many.count[0], many.num_merges[0]) == (8, 0)
  nearly = make([100], [1], 1, 4).small  # 7 blocks
  assert (nearly.stop - nearly.start)[: int(nearly.count[0])].tolist() == [
    2,
    2,
    2,
    1,
  ]


def test_there_is_room_for_all_that_is_split() -> None:
  """The most tiles are split if each has a block more than a split."""
  for num_seqs in range(1, 9):
    for blocks in range(1, 60):
      contexts = [blocks * TILING.block_n] * num_seqs
      small = make(contexts, [1] * num_seqs, num_seqs, 1, num_tokens=8).small
      assert small.num_merges[0] <= len(small.merge_seq)
      assert small.count[0] <= len(small.seq)


def test_traced_plans_are_the_same() -> None:
  arguments = [700, 33, 90], [1, 1, 30], 2, 4
  jax.tree.map(
    np.testing.assert_array_equal,
    make(*arguments, xp=jnp),
    make(*arguments),
  )


def test_plans_are_int32_and_of_fixed_shape() -> None:
  a, b = make([], [], 0, 4), make([700, 33, 90], [1, 1, 30], 2, 4)
  assert jax.tree.map(np.shape, a) == jax.tree.map(np.shape, b)
  assert {x.dtype.name for x in jax.tree.leaves((a, b))} == {'int32'}
  assert not list(items_of(a)) and not a.small.num_merges
