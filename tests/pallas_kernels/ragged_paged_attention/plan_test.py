# SPDX-License-Identifier: Apache-2.0
"""A plan does all that is to be done, and does it once."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import hypothesis
from hypothesis import strategies
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.ragged_paged_attention import plan as plan_lib

TILING = plan_lib.Tiling(
  wide_rows=32, narrow_rows=16, block_n=16, num_items=12, min_split=2
)


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
  xp=np,
) -> plan_lib.Plan:
  arrays = batch(contexts, q_lens, num_decodes, num_seqs)
  plan = plan_lib.make(
    *map(xp.asarray, arrays),
    tiling=TILING,
    num_tokens=num_tokens,
    group=group,
    sliding_window=window,
    xp=xp,
  )
  return plan_lib.Plan(*map(np.asarray, plan))


def check(
  plan: plan_lib.Plan,
  contexts: list[int],
  q_lens: list[int],
  group: int,
  window: int | None,
) -> None:
  done: collections.Counter[tuple[int, int, int]] = collections.Counter()
  slots = {}
  for i in np.flatnonzero(plan.rows):
    seq, first = plan.seq[i], plan.first_row[i]
    rows = range(first, min(first + plan.rows[i], q_lens[seq] * group))
    assert rows, 'a tile without rows'
    assert plan.start[i] < plan.stop[i], 'an item without keys'
    for row in rows:
      for block in range(plan.start[i], plan.stop[i]):
        done[seq, row, block] += 1
    if plan.slot[i] != plan_lib.NO_SLOT:
      assert plan.slot[i] not in slots, 'a slot is shared'
      slots[plan.slot[i]] = seq, first
      assert plan.rows[i] == TILING.narrow_rows
  assert set(done.values()) <= {1}, 'keys are met twice'
  for seq, (context, q_len) in enumerate(zip(contexts, q_lens, strict=True)):
    for row in range(q_len * group):
      at = context - q_len + row // group
      oldest = 0 if window is None else max(at - window + 1, 0)
      for block in range(oldest // TILING.block_n, at // TILING.block_n + 1):
        assert (seq, row, block) in done, 'keys are left out'
  merged = {
    slot: (plan.merge_seq[i], plan.merge_row[i])
    for i in np.flatnonzero(plan.merge_count)
    for slot in range(
      plan.merge_slot[i], plan.merge_slot[i] + plan.merge_count[i]
    )
  }
  assert merged == slots, 'what is partial is merged, and nothing else'
  cost = np.where(plan.rows > 0, plan.rows * (plan.stop - plan.start), -1)
  assert (np.diff(cost) <= 0).all(), 'longest first'


@pytest.mark.parametrize('window', [None, 1, 40])
@pytest.mark.parametrize('group', [1, 4, 7, 71])
@hypothesis.given(data=strategies.data())
@hypothesis.settings(max_examples=40)
def test_every_key_is_met_once(
  group: int, window: int | None, data: strategies.DataObject
) -> None:
  num_decodes = data.draw(strategies.integers(0, 8))
  q_lens = [1] * num_decodes + data.draw(
    strategies.lists(
      strategies.integers(1, 28), max_size=min(8 - num_decodes, 2)
    )
  )
  contexts = [n + data.draw(strategies.integers(0, 700)) for n in q_lens]
  plan = make(contexts, q_lens, num_decodes, group, window)
  check(plan, contexts, q_lens, group, window)


def test_a_gap_is_noticed() -> None:
  """The check itself: it fails if an item ends a block too soon."""
  plan = make([400, 90], [1, 20], 1, 4)
  check(plan, [400, 90], [1, 20], 4, None)
  with pytest.raises(AssertionError, match='left out'):
    shorter = plan.stop - (plan.stop - plan.start > 1)
    check(plan._replace(stop=shorter), [400, 90], [1, 20], 4, None)


def test_the_worked_example() -> None:
  tiling = plan_lib.Tiling(
    wide_rows=64, narrow_rows=16, block_n=64, num_items=4
  )
  plan = plan_lib.make(
    np.array([1024, 120]),
    np.array([0, 1, 21]),
    np.array([1, 2]),
    tiling=tiling,
    num_tokens=21,
    group=4,
  )
  real = plan.rows > 0
  items = zip(*(column[real].tolist() for column in plan[:6]), strict=True)
  assert list(items) == [
    (64, 1, 0, 0, 2, -1),
    (64, 1, 64, 0, 2, -1),
    (16, 0, 0, 0, 4, 0),
    (16, 0, 0, 4, 8, 1),
    (16, 0, 0, 8, 12, 2),
    (16, 0, 0, 12, 16, 3),
  ]
  assert plan.merge_count.tolist() == [4, 0]


def test_decodes_fill_the_device() -> None:
  """A lone long context is split among all; many contexts are not."""
  alone = make([700], [1], 1, 4)
  assert (alone.rows > 0).sum() == TILING.num_items - 1  # of 4 blocks each
  many = make([64] * 8, [1] * 8, 8, 4)
  assert (many.slot == plan_lib.NO_SLOT).sum() >= len(many.slot) - 16


def test_traced_plans_are_the_same() -> None:
  arguments = [700, 33, 90], [1, 1, 30], 2, 4
  want = make(*arguments)
  for got, column in zip(make(*arguments, xp=jnp), want, strict=True):
    np.testing.assert_array_equal(got, column)


def test_plans_are_int32_and_of_fixed_shape() -> None:
  a, b = make([], [], 0, 4), make([700, 33, 90], [1, 1, 30], 2, 4)
  assert jax.tree.map(np.shape, a) == jax.tree.map(np.shape, b)
  assert {x.dtype.name for x in a + b} == {'int32'}
  assert not a.rows.any() and not a.merge_count.any()


@pytest.mark.parametrize('window', [None, 1, 40])
@pytest.mark.parametrize('group', [1, 4, 71])
@hypothesis.given(data=strategies.data())
@hypothesis.settings(max_examples=40)
def test_two_plans_share_a_batch(
  group: int, window: int | None, data: strategies.DataObject
) -> None:
  """What one kernel leaves out, the other does: each query, and its keys."""
  num_decodes = data.draw(strategies.integers(0, 8))
  q_lens = [1] * num_decodes + data.draw(
    strategies.lists(
      strategies.integers(1, 28), max_size=min(8 - num_decodes, 2)
    )
  )
  contexts = [n + data.draw(strategies.integers(0, 700)) for n in q_lens]
  arrays = batch(contexts, q_lens, num_decodes)
  options: Any = dict(num_tokens=64, sliding_window=window)
  small = plan_lib.make(
    *arrays,
    tiling=dataclasses.replace(TILING, has_wide=False),
    group=group,
    **options,
  )
  chunks = plan_lib.make_chunks(
    *arrays, tile=8, block_n=32, small=TILING.narrow_rows // group, **options
  )
  real = small.rows > 0
  assert (small.rows[real] == TILING.narrow_rows).all()
  done = {
    (seq, row // group)
    for seq, first in zip(small.seq[real], small.first_row[real], strict=True)
    for row in range(
      first, min(first + TILING.narrow_rows, q_lens[seq] * group)
    )
  }
  for i in range(int(chunks.count[0])):
    seq, first = chunks.seq[i], chunks.first_query[i]
    stop = min(first + 8, q_lens[seq])
    assert first < stop
    queries = {(seq, query) for query in range(first, stop)}
    assert not queries & done
    done |= queries
    past = contexts[seq] - q_lens[seq]
    oldest = 0 if window is None else max(past + first - window + 1, 0)
    assert chunks.start[i] == oldest // 32
    assert chunks.stop[i] == -(-(past + stop) // 32)
  assert done == {
    (seq, query) for seq, n in enumerate(q_lens) for query in range(n)
  }
  cost = (chunks.stop - chunks.start)[: chunks.count[0]]
  assert (np.diff(cost) <= 0).all(), 'longest first'
