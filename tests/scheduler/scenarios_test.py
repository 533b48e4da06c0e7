# SPDX-License-Identifier: Apache-2.0
"""Scripts of arrivals, and the exact batches that each policy makes of them.

A batch is written as its chunks: `A6` is the decode that computes A's token 6
(A's prompt is tokens 0, 1, ...), `B[0,4)` a chunk of B's prefill.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
import itertools
from typing import Any

import pytest

from sarathi_jax import config as config_lib
from sarathi_jax import scheduler as scheduler_lib
from sarathi_jax import types
from tests.scheduler import checker as checker_lib

POLICIES = tuple(scheduler_lib.POLICIES)


def make_config(**fields: Any) -> config_lib.SchedulerConfig:
  """Pages are plenty and nothing is ahead, but for what `fields` says."""
  defaults = dict(
    token_budget=8,
    max_num_seqs=4,
    max_model_len=32,
    num_pages=64,
    page_size=4,
    look_ahead=False,
    short_prompt_share=0.0,
    prefix_cache=False,
  )
  return config_lib.SchedulerConfig(**(defaults | fields))


def show(batch: types.ScheduledBatch) -> str:
  return ' '.join(
    f'{c.request_id}[{c.start},{c.start + c.num_tokens})'
    if c.is_prefill
    else f'{c.request_id}{c.start}'
    for c in batch.chunks
  )


def play(
  policy: str,
  config: config_lib.SchedulerConfig,
  arrivals: Mapping[int, tuple[types.Request, ...]],
) -> list[str]:
  """Runs to the end, one batch at a time.

  Args:
    policy: whose batches.
    config: of its scheduler.
    arrivals: step -> the requests that come before it is scheduled.

  Returns:
    The batches.
  """
  checker = checker_lib.make_checker(policy, config)
  table: list[str] = []
  while not checker.is_idle or len(table) <= max(arrivals):
    for request in arrivals.get(len(table), ()):
      checker.add(request)
    table.append(show(checker.schedule()))
    checker.complete()
  return table


request = checker_lib.make_request

# A and B decode when C, too long for one step's budget, and D arrive.
FIGURE_7 = {
  0: (request('A', 3, 5), request('B', 2, 3)),
  2: (request('C', 10, 2), request('D', 2, 2)),
}
FIGURE_7_BATCHES = {
  # C and D wait until the whole batch of A and B is done.
  'faster_transformer': [
    'A[0,3) B[0,2)',
    'A3 B2',
    'A4 B3',
    'A5',
    'A6',
    'C[0,10) D[0,2)',
    'C10 D2',
  ],
  # A and B stall for two steps while the prompts of C and D run.
  'vllm': [
    'A[0,3) B[0,2)',
    'A3 B2',
    'C[0,10)',
    'D[0,2)',
    'A4 B3 C10 D2',
    'A5',
    'A6',
  ],
  # No stall, but the step with the whole of C and D holds 14 tokens.
  'orca': [
    'A[0,3) B[0,2)',
    'A3 B2',
    'A4 B3 C[0,10) D[0,2)',
    'A5 C10 D2',
    'A6',
  ],
  # No stall, and no step holds more than the budget of 8.
  'sarathi': [
    'A[0,3) B[0,2)',
    'A3 B2',
    'A4 B3 C[0,6)',
    'A5 C[6,10) D[0,2)',
    'A6 C10 D2',
  ],
}


@pytest.mark.parametrize('policy', POLICIES)
def test_figure_7(policy: str) -> None:
  assert play(policy, make_config(), FIGURE_7) == FIGURE_7_BATCHES[policy]


def test_vllm_stalls_decodes_and_sarathi_does_not() -> None:
  arrivals = {0: (request('A', 1, 9),)} | {
    i: (request(f'P{i}', 8, 1),) for i in range(1, 6)
  }
  config = make_config()
  assert play('vllm', config, arrivals)[:8] == [
    'A[0,1)',
    'P1[0,8)',
    'P2[0,8)',
    'P3[0,8)',
    'P4[0,8)',
    'P5[0,8)',
    'A1',
    'A2',
  ]
  assert play('sarathi', config, arrivals)[:8] == [
    'A[0,1)',
    'A1 P1[0,7)',
    'A2 P1[7,8) P2[0,6)',
    'A3 P2[6,8) P3[0,5)',
    'A4 P3[5,8) P4[0,4)',
    'A5 P4[4,8) P5[0,3)',
    'A6 P5[3,8)',
    'A7',
  ]


def test_a_short_prompt_gets_a_share_beside_a_long_one() -> None:
  arrivals = {0: (request('L', 30, 1),), 1: (request('S', 2, 1),)}
  assert play('sarathi', make_config(short_prompt_share=0.25), arrivals) == [
    'L[0,8)',
    'L[8,14) S[0,2)',
    'L[14,22)',
    'L[22,30)',
  ]


def test_without_a_share_a_short_prompt_waits_for_the_long_one() -> None:
  arrivals = {0: (request('L', 30, 1),), 1: (request('S', 2, 1),)}
  assert play('sarathi', make_config(short_prompt_share=0.0), arrivals) == [
    'L[0,8)',
    'L[8,16)',
    'L[16,24)',
    'L[24,30) S[0,2)',
  ]


def test_a_share_is_not_kept_for_a_longer_prompt() -> None:
  arrivals = {0: (request('L', 20, 1), request('M', 30, 1))}
  config = make_config(short_prompt_share=0.25)
  assert play('sarathi', config, arrivals)[:3] == [
    'L[0,8)',
    'L[8,16)',
    'L[16,20) M[0,4)',
  ]


def test_a_share_is_not_kept_where_no_sequence_can_be_admitted() -> None:
  arrivals = {0: (request('L', 20, 1),), 1: (request('S', 2, 1),)}
  config = make_config(short_prompt_share=0.25, max_num_seqs=1)
  assert play('sarathi', config, arrivals) == [
    'L[0,8)',
    'L[8,16)',
    'L[16,20)',
    'S[0,2)',
  ]


def test_what_is_kept_for_a_short_prompt_is_what_it_needs() -> None:
  arrivals = {
    0: (request('D', 1, 9),),
    1: (request('L', 900, 1), request('S', 90, 1)),
  }
  config = make_config(
    token_budget=512, max_model_len=1024, num_pages=999, short_prompt_share=0.25
  )
  assert play('sarathi', config, arrivals)[1:3] == [
    'D1 L[0,421) S[0,90)',
    'D2 L[421,900)',
  ]


def test_the_share_is_not_cut_into_ever_smaller_ones() -> None:
  arrivals = {
    0: tuple(
      request(name, n, 1)
      for name, n in (('A', 300), ('B', 200), ('C', 150), ('E', 100))
    )
  }
  config = make_config(
    token_budget=256, max_model_len=1024, num_pages=999, short_prompt_share=0.25
  )
  # 64 of 256 are kept for those behind A; B takes all that is kept.
  assert play('sarathi', config, arrivals)[:2] == [
    'A[0,192) B[0,64)',
    'A[192,300) B[64,148) C[0,64)',
  ]


def test_the_youngest_is_preempted_and_comes_back_first() -> None:
  config = make_config(max_model_len=12, num_pages=3)
  arrivals = {
    0: (request('A', 3, 4), request('B', 1, 5), request('C', 1, 4)),
    1: (request('D', 1, 1),),
  }
  assert play('sarathi', config, arrivals) == [
    'A[0,3) B[0,1) C[0,1)',
    'A3 B1 C1',
    'A4 B2',  # A's token 4 needs a second page: C gives up its one.
    'A5 B3',
    'B4 C[0,3)',  # A is done. C computes its two output tokens anew.
    'C3 D[0,1)',
  ]


# B is the oldest, and C and E come after it, but are more urgent.
URGENCY = {
  0: (request('B', 1, 7, priority=1), request('A', 3, 4)),
  1: (request('C', 1, 4),),
  3: (request('D', 1, 2, priority=1), request('E', 1, 2, priority=-1)),
}
URGENCY_BATCHES = {
  'sarathi': [
    'A[0,3) B[0,1)',
    'A3 B1 C[0,1)',
    'A4 C1',  # A's token 4 needs a second page: B gives up its one.
    'A5 C2',
    'C3 E[0,1) B[0,3)',  # A is done. E goes before B, and B before D.
    'E1 B3 D[0,1)',
    'B4 D1',
    'B5',
    'B6',
  ],
  'vllm': [
    'A[0,3) B[0,1)',
    'C[0,1)',
    'A3 C1 B1',
    'A4 C2',
    'A5 C3',
    'E[0,1) B[0,3) D[0,1)',
    'E1 B3 D1',
    'B4',
    'B5',
    'B6',
  ],
}


@pytest.mark.parametrize('policy', URGENCY_BATCHES)
def test_the_least_urgent_is_preempted(policy: str) -> None:
  config = make_config(max_model_len=12, num_pages=3)
  assert play(policy, config, URGENCY) == URGENCY_BATCHES[policy]


def test_one_that_is_urgent_and_known_ahead_holds_up_nobody() -> None:
  checker = checker_lib.make_checker('sarathi', make_config())
  checker.add(request('A', 3, 2))
  checker.add(request('B', 3, 2, priority=-1, arrival_time=5.0))
  assert show(checker.schedule(0.0)) == 'A[0,3)'
  checker.complete()
  assert show(checker.schedule(5.0)) == 'A3 B[0,3)'


def test_of_two_preempted_the_older_comes_back_first() -> None:
  config = make_config(max_model_len=12, num_pages=3)
  arrivals = {0: (request('A', 3, 4), request('B', 3, 3), request('C', 2, 3))}
  assert play('sarathi', config, arrivals) == [
    'A[0,3) B[0,3) C[0,2)',
    'A3 B3 C2',
    'A4',  # A and B need a page each: C's is not enough, so B goes, too.
    'A5',  # One page is free: B needs two, and C may not overtake it.
    'B[0,5) C[0,3)',
    'C[3,4)',
  ]


def test_decodes_wait_rather_than_preempt_a_sequence_in_flight() -> None:
  config = make_config(max_model_len=12, num_pages=3, look_ahead=True)
  checker = checker_lib.make_checker('sarathi', config)
  for name in 'ABC':
    checker.add(request(name, 3, 4))
  assert show(checker.schedule()) == 'A[0,3) B[0,3) C[0,2)'
  assert show(checker.schedule()) == 'A3 B3 C[2,3)'
  checker.complete()
  assert show(checker.schedule()) == ''  # A and B need pages; C is in flight.
  checker.complete()
  batch = checker.schedule()
  assert batch.preempted == ('C', 'B')
  assert show(batch) == 'A4'


def test_look_ahead_decodes_carry_no_token() -> None:
  checker = checker_lib.make_checker('sarathi', make_config(look_ahead=True))
  checker.add(request('A', 3, 5))
  prefill, first = checker.schedule(), checker.schedule()
  assert prefill.chunks[0].tokens == request('A', 3, 5).prompt_token_ids
  assert first.chunks[0].tokens == ()
  checker.complete()
  checker.complete()
  known = checker_lib.token_at('A', 4)
  assert checker.schedule().chunks[0].tokens == (known,)


def test_with_two_stages_a_sequence_is_in_every_other_batch() -> None:
  checker = checker_lib.make_checker(
    'sarathi', make_config(num_stages=2, look_ahead=True)
  )
  checker.add(request('A', 8, 3))
  checker.add(request('B', 8, 3))
  table = []
  for _ in range(6):
    table.append(show(checker.schedule()))
    if checker.num_in_flight == 3:
      checker.complete()
  assert table == ['A[0,8)', 'B[0,8)', 'A8', 'B8', 'A9', 'B9']


class CountingDeque(deque[Any]):
  """A deque that counts how many of its items were looked at."""

  num_looks = 0

  def __getitem__(self, index: Any) -> Any:
    self.num_looks += 1
    return super().__getitem__(index)

  def __iter__(self) -> Iterator[Any]:
    for item in super().__iter__():
      self.num_looks += 1
      yield item

  def popleft(self) -> Any:
    self.num_looks += 1
    return super().popleft()


@pytest.mark.parametrize('policy', POLICIES)
def test_cost_does_not_grow_with_the_queue(policy: str) -> None:
  def num_looks(num_waiting: int) -> int:
    scheduler = scheduler_lib.policy_class(policy)(
      make_config(short_prompt_share=0.25)
    )
    scheduler.waiting = CountingDeque()
    for i in range(num_waiting):
      scheduler.add(request(f'r{i}', 5, 4))
    scheduler.waiting.num_looks = 0  # Adding is done once.
    for _ in range(20):
      batch = scheduler.schedule(0.0)
      scheduler.complete(
        batch,
        types.Sampled.of(
          batch.chunks, itertools.repeat(0), itertools.repeat(0.0)
        ),
      )
    return scheduler.waiting.num_looks

  assert num_looks(10_000) == num_looks(1000) > 20
