# SPDX-License-Identifier: Apache-2.0
"""Several outputs of a prompt: one prefill, pages that fork, and n of each.

That all tokens lie where they should is `checker`'s to say, in every test.
"""

from __future__ import annotations

from typing import Any

import pytest

from sarathi_jax import config as config_lib
from sarathi_jax import errors
from sarathi_jax import scheduler as scheduler_lib
from sarathi_jax import types
from tests.scheduler import checker as checker_lib

POLICIES = tuple(scheduler_lib.POLICIES)
Checker = checker_lib.Checker
request = checker_lib.make_request


def make(policy: str = 'sarathi', **changes: Any) -> Checker:
  return checker_lib.make_checker(
    policy,
    config_lib.SchedulerConfig(
      **(
        dict(
          token_budget=64,
          max_num_seqs=16,
          max_model_len=128,
          num_pages=64,
          page_size=4,
          look_ahead=False,
          prefix_cache=False,
        )
        | changes
      )
    ),
  )


def num_held(checker: Checker) -> int:
  return checker.config.num_pages - checker.scheduler.pages.num_free


def step(checker: Checker) -> types.ScheduledBatch:
  batch = checker.schedule()
  if batch.chunks:
    checker.complete()
  return batch


@pytest.mark.parametrize('policy', ['sarathi', 'vllm'])
def test_eight_outputs_take_the_pages_of_one_prompt_and_eight_tails(
  policy: str,
) -> None:
  checker = make(policy)
  checker.add(request('r', 50, 8, n=8))  # 12 pages are full, one is not
  first = step(checker)
  assert first.num_tokens == 50 and len(first.forks) == 7
  second = step(checker)
  assert num_held(checker) == 12 + 8
  assert len(second.chunks) == 8
  # The first one goes on where its prompt ends.
  assert [source for source, _ in second.copies] == [
    first.chunks[0].page_table[-1]
  ] * 7
  targets = {target for _, target in second.copies}
  assert targets == {c.page_table[-1] for c in second.chunks[1:]}
  assert step(checker).copies == ()
  checker.drain()
  assert num_held(checker) == 0
  assert checker.scheduler.num_prefilled == 50  # once


def test_nothing_is_copied_where_pages_are_full() -> None:
  checker = make()
  checker.add(request('r', 48, 6, n=4))
  batches = [step(checker) for _ in range(4)]
  assert all(batch.copies == () for batch in batches)
  assert num_held(checker) == 12 + 4
  checker.drain()


def test_the_last_holder_of_a_page_needs_no_copy() -> None:
  """As others are gone before it writes."""
  checker = make(num_stages=2)
  checker.add(request('r', 6, 6, n=3))
  checker.schedule()
  checker.complete()
  checker.remove('r')
  checker.remove('r/1')
  assert num_held(checker) == 2
  batch = step(checker)
  assert batch.copies == () and num_held(checker) == 2
  checker.drain()


@pytest.mark.parametrize('policy', POLICIES)
def test_a_page_is_there_to_copy_when_the_first_has_ended(policy: str) -> None:
  checker = make(policy)
  checker.add(request('r', 6, 6, n=3))
  step(checker)
  checker.remove('r')
  batch = step(checker)
  assert batch.num_tokens == 2
  checker.drain()


def test_a_preempted_output_is_recomputed_alone() -> None:
  """The others go on; nothing of it is lost."""
  checker = make(num_pages=24, max_model_len=64)
  checker.add(request('r', 50, None, n=4))
  batches = []
  while checker.live:
    batches.append(step(checker))
  preempted = [key for batch in batches for key in batch.preempted]
  assert 'r/3' in preempted and 'r' not in preempted
  assert {len(b.chunks) for b in batches if 'r/3' in b.preempted} == {3}
  recomputed = [
    c
    for batch in batches[1:]
    for c in batch.chunks
    if c.is_prefill and c.request_id == 'r/3'
  ]
  assert recomputed and recomputed[0].start == 0
  assert {k: known.num_on_host for k, known in checker.finished.items()} == (
    dict.fromkeys(('r', 'r/1', 'r/2', 'r/3'), 64)
  )


@pytest.mark.parametrize('policy', POLICIES)
def test_before_its_prompt_is_computed_a_request_is_preempted_as_one(
  policy: str,
) -> None:
  checker = make(policy, token_budget=16)
  checker.add(request('a', 40, 3, n=3))
  checker.schedule()
  if policy == 'sarathi':  # Elsewhere the one chunk ends the prompt.
    checker.complete()
    assert checker.scheduler.slots.num_free() == 16 - 3
    checker.preempt_all()
    assert checker.scheduler.slots.num_free() == 16
    assert len(checker.scheduler.waiting) == 1 and num_held(checker) == 0
    assert len(step(checker).forks) == 0
    step(checker)
    assert len(step(checker).forks) == 2
  checker.drain()
  assert len(checker.finished) == 3


@pytest.mark.parametrize('name', ['a', 'a/1'])
@pytest.mark.parametrize('is_running', [False, True])
def test_before_its_prompt_is_computed_a_request_is_removed_as_one(
  name: str, is_running: bool
) -> None:
  checker = make(token_budget=16)
  checker.add(request('a', 40, 3, n=3))
  if is_running:
    checker.schedule()
  checker.remove(name)
  assert not checker.live and num_held(checker) == 0
  assert checker.scheduler.slots.num_free() == 16
  if is_running:
    checker.complete()


def test_a_request_waits_for_slots_for_all_its_outputs() -> None:
  checker = make(max_num_seqs=4)
  checker.add(request('a', 4, 5, n=3))
  checker.add(request('b', 4, 5, n=2))
  checker.add(request('c', 4, 5))  # First come, first served.
  for _ in range(5):
    batch = step(checker)
    assert not any(c.request_id[0] in 'bc' for c in batch.chunks)
  assert {c.request_id for c in step(checker).chunks} == {'b', 'c'}
  checker.drain()


def test_pages_for_all_outputs_count_at_admission() -> None:
  """Or they would be preempted as soon as they begin."""
  checker = make(num_pages=20, max_model_len=80)
  checker.add(request('a', 42, 5))  # 11 pages, which 12 tokens more need
  checker.add(request('b', 14, 2, n=6))  # 4 pages, and 5 copies of the last
  batch = step(checker)
  assert [c.request_id for c in batch.chunks] == ['a', 'b']
  checker = make(num_pages=19, max_model_len=76)
  checker.add(request('a', 42, 5))
  checker.add(request('b', 14, 2, n=6))
  batch = step(checker)
  assert [c.request_id for c in batch.chunks] == ['a']
  checker.drain()
  assert checker.num_preempted == 0


@pytest.mark.parametrize('policy', POLICIES)
def test_more_outputs_than_the_cache_has_room_for_are_made_in_turn(
  policy: str,
) -> None:
  checker = make(policy, num_pages=16, max_model_len=64)
  checker.add(request('r', 61, None, n=8))
  checker.drain()
  assert len(checker.finished) == 8


@pytest.mark.parametrize('policy', ['orca', 'faster_transformer'])
def test_what_is_reserved_for_each_output_makes_preemption_needless(
  policy: str,
) -> None:
  checker = make(policy, num_pages=52, max_model_len=64)
  checker.add(request('a', 17, None, n=4))  # 4 pages shared, 12 each
  checker.add(request('b', 5, None))
  batch = step(checker)
  assert num_held(checker) == 52
  assert [c.request_id for c in batch.chunks] == ['a']
  checker.drain()
  assert checker.num_preempted == 0


def test_seeds_are_one_more_each_and_wrap() -> None:
  def seeds(seed: int) -> list[int]:
    scheduler = make().scheduler
    params = types.SamplingParams(n=3, seed=seed)
    return [
      seq.seed
      for seq in scheduler.add(
        types.Request(request_id='r', prompt_token_ids=(1,), sampling=params)
      )
    ]

  assert seeds(7) == [7, 8, 9]
  assert seeds(-2) == [-2, -1, 0]
  assert seeds(2**63 - 2) == [2**63 - 2, 2**63 - 1, -(2**63)]


def test_adjusted_outputs_are_set_up_each_with_the_prompt() -> None:
  params = types.SamplingParams(n=3, presence_penalty=1.0, max_tokens=4)
  scheduler = make(max_adjusted_seqs=3).scheduler
  scheduler.add(
    types.Request(request_id='r', prompt_token_ids=(1, 2, 3), sampling=params)
  )
  batch = scheduler.schedule(0.0)
  assert sorted(c.slot for c in batch.samplers) == [0, 1, 2]
  assert [c.setup for c in batch.samplers] == [types.SlotSetup((1, 2, 3))] * 3
  scheduler.complete(
    batch, types.Sampled.of(batch.samplers, (5, 6, 7), (0.0,) * 3)
  )
  assert all(c.setup is None for c in scheduler.schedule(0.0).samplers)


@pytest.mark.parametrize(
  ('params', 'message'),
  [
    (types.SamplingParams(n=17), 'n=17: must be at most max_num_seqs=16'),
    (
      types.SamplingParams(n=4, min_tokens=1),
      'n=4: must be at most max_adjusted_seqs=3',
    ),
  ],
)
def test_more_than_can_run_at_once_are_refused(
  params: types.SamplingParams, message: str
) -> None:
  scheduler = make(max_adjusted_seqs=3).scheduler
  asked = types.Request(request_id='r', prompt_token_ids=(1,), sampling=params)
  with pytest.raises(errors.InvalidRequestError, match=message):
    scheduler.check(asked)
