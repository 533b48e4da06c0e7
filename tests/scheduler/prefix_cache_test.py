# SPDX-License-Identifier: Apache-2.0
"""What is found in the cache, batch by batch, worked by hand.

`checker` holds for all of it: what a chunk begins after is what its own tokens
would have left there, and was computed.
"""

from __future__ import annotations

import array
from typing import Any

import pytest

from sarathi_jax import page_groups
from sarathi_jax import types
from tests.scheduler import checker as checker_lib
from tests.scheduler import scenarios_test

PAGE = 4
show = scenarios_test.show


def make(policy: str = 'sarathi', **fields: Any) -> checker_lib.Checker:
  config = scenarios_test.make_config(
    **(dict(page_size=PAGE, prefix_cache=True) | fields)
  )
  return checker_lib.make_checker(policy, config)


def add(
  checker: checker_lib.Checker,
  request_id: str,
  length: int,
  *beginnings: tuple[str, int],
  max_tokens: int = 1,
  **fields: Any,
) -> None:
  checker.add(
    checker_lib.make_request(
      request_id, length, max_tokens, beginnings=beginnings, **fields
    )
  )


def steps(checker: checker_lib.Checker) -> list[str]:
  """All batches until all is done, one at a time."""
  batches = []
  while not checker.is_idle:
    batches.append(show(checker.schedule()))
    checker.complete()
  return batches


@pytest.mark.parametrize(
  'windows', [(None,), (None, None), (6,), (None, 64), (None, None, 6, 1)]
)
def test_what_is_alike_is_found(windows: page_groups.Windows) -> None:
  checker = make(windows=windows)
  add(checker, 'A', 8)
  assert steps(checker) == ['A[0,8)']
  # The same again: a token at least is computed.
  add(checker, 'B', 8, ('A', 8))
  assert steps(checker) == ['B[7,8)']
  add(checker, 'C', 12, ('A', 8))
  assert steps(checker) == ['C[8,12)']
  add(checker, 'D', 12, ('A', 7))  # The second page is another, at its end.
  assert steps(checker) == ['D[7,12)']
  add(checker, 'E', 4, ('A', 4))
  assert steps(checker) == ['E[3,4)']
  prefixes = checker.scheduler.prefixes
  assert (prefixes.num_looked_up, prefixes.num_found) == (44, 25)
  assert checker.scheduler.num_prefilled == 44 - 25


def test_pages_that_are_used_in_part_are_copied() -> None:
  """And those of the sequence that is found are left as they are."""
  checker = make()
  add(checker, 'A', 10, max_tokens=2)
  steps(checker)
  add(checker, 'B', 12, ('A', 10))
  add(checker, 'C', 12, ('A', 9))
  batch = checker.schedule()
  assert show(batch) == 'B[10,12) C[9,12)'
  (first, own_b), (second, own_c) = batch.copies
  assert first == second and len({first, own_b, own_c}) == 3
  for chunk, own in zip(batch.chunks, (own_b, own_c), strict=True):
    assert chunk.page_table[2] == own
  checker.complete()


def test_answers_that_are_cut_off_are_found() -> None:
  checker = make(token_budget=8)
  add(checker, 'A', 5, max_tokens=8)
  for _ in range(3):
    checker.schedule()
    checker.complete()
  checker.remove('A')
  # Of its eight tokens the last one was not computed.
  add(checker, 'B', 10, ('A', 8))
  assert steps(checker) == ['B[7,10)']


def test_what_is_recomputed_in_flight_is_not_found() -> None:
  checker = make(look_ahead=True)
  add(checker, 'A', 2, max_tokens=8)
  checker.schedule()
  checker.complete()
  checker.preempt_all()
  assert show(checker.schedule()) == 'A[0,3)'
  checker.remove('A')
  add(checker, 'B', 4, ('A', 2))
  assert show(checker.schedule()) == 'B[0,4)'
  checker.complete()


def test_a_small_part_of_a_page_is_not_worth_a_copy() -> None:
  checker = make(page_size=16, token_budget=64, max_model_len=128)
  add(checker, 'A', 31)
  steps(checker)
  for name, alike, start in (('B', 20, 20), ('C', 19, 16), ('D', 3, 0)):
    add(checker, name, 40, ('A', alike))
    assert steps(checker) == [f'{name}[{start},40)']


def test_of_many_that_begin_alike_the_latest_are_compared() -> None:
  checker = make(num_pages=60)
  for i in range(12):
    add(checker, f'A{i}', 7, ('shared', 5), (f'part{i}', 6 + i % 2))
    steps(checker)
  add(checker, 'B', 8, ('shared', 5), ('part11', 7))
  assert steps(checker) == ['B[7,8)']
  add(checker, 'C', 8, ('shared', 5), ('part1', 7))
  assert steps(checker) == ['C[5,8)']


def test_outputs_are_found_by_the_next_turn_of_a_chat() -> None:
  checker = make()
  add(checker, 'A', 6, max_tokens=7)
  assert steps(checker)[0] == 'A[0,6)'
  # Of its 13 tokens the last one is in no page: nobody went on after it. So it
  # is wherever the answer ends.
  turn = types.Request(
    request_id='B',
    prompt_token_ids=(*(checker_lib.token_at('A', p) for p in range(13)), 1),
    sampling=types.SamplingParams(max_tokens=1),
  )
  checker.add(turn)
  assert steps(checker) == ['B[12,14)']


def test_found_tokens_cost_nothing_of_the_budget() -> None:
  checker = make(token_budget=8)
  add(checker, 'A', 24)
  assert len(steps(checker)) == 3
  add(checker, 'B', 26, ('A', 24))
  add(checker, 'C', 6)
  assert steps(checker) == ['B[24,26) C[0,6)']


@pytest.mark.parametrize('policy', ['vllm', 'orca', 'faster_transformer'])
def test_policies_that_take_prompts_whole_take_what_is_missing(policy) -> None:
  checker = make(policy, token_budget=8)
  add(checker, 'A', 24)
  steps(checker)
  add(checker, 'B', 26, ('A', 24))
  add(checker, 'C', 6)
  assert steps(checker) == ['B[24,26) C[0,6)']


def test_the_preempted_get_back_what_nobody_took() -> None:
  checker = make(num_pages=8, max_num_seqs=2, token_budget=32)
  add(checker, 'A', 12, max_tokens=8)
  add(checker, 'B', 12, max_tokens=8)
  batches = steps(checker)
  assert batches[0] == 'A[0,12) B[0,12)'
  again = next(b for b in batches[1:] if 'B[' in b)
  # B lost its last page to A, and of its 16 tokens finds the first 12.
  assert again.endswith('B[12,17)') or again.endswith('B[8,17)'), batches
  assert checker.scheduler.prefixes.num_found_again
  assert checker.scheduler.num_prefilled == 24


def test_who_has_the_least_room_evicts_the_longest_unused() -> None:
  checker = make(num_pages=9, token_budget=32)
  for name in 'AB':
    add(checker, name, 12)
    steps(checker)
  add(checker, 'A2', 13, ('A', 12))  # A's are the latest again.
  assert steps(checker) == ['A2[12,13)']
  add(checker, 'C', 16)  # Takes the two without a key, and two of B's.
  steps(checker)
  add(checker, 'B2', 13, ('B', 12))
  assert steps(checker) == ['B2[4,13)']


def test_found_pages_count_as_room_that_is_taken() -> None:
  """Or the pool would be overcommitted."""
  checker = make(num_pages=8, token_budget=32)
  add(checker, 'A', 16)
  steps(checker)
  add(checker, 'B', 16, max_tokens=16)
  assert show(checker.schedule()) == 'B[0,16)'
  checker.complete()
  # B has 4 of 8 pages, and needs one; A's four lie free. C finds three of
  # these, and needs two more: there is but one.
  add(checker, 'C', 20, ('A', 16))
  assert show(checker.schedule()) == 'B16'
  checker.complete()


def test_salts_and_weights_keep_apart() -> None:
  checker = make()
  add(checker, 'A', 8, cache_salt='ann')
  steps(checker)
  add(checker, 'B', 8, ('A', 8), cache_salt='bob')
  assert steps(checker) == ['B[0,8)']
  add(checker, 'C', 8, ('A', 8), cache_salt='ann')
  assert steps(checker) == ['C[7,8)']
  checker.preempt_all()
  add(checker, 'D', 8, ('A', 8), cache_salt='ann')
  assert steps(checker) == ['D[0,8)']


def test_where_rotations_depend_on_the_prompts_length() -> None:
  checker = make(dynamic_rope_len=8, token_budget=32)
  for name, length, batch in (
    ('A', 8, 'A[0,8)'),
    ('B', 7, 'B[6,7)'),  # Up to 8 all are alike.
    ('C', 12, 'C[0,12)'),
    ('D', 12, 'D[7,12)'),
    ('E', 13, 'E[0,13)'),
  ):
    add(checker, name, length, ('A', 7))
    assert steps(checker) == [batch]


def test_where_rotations_depend_on_what_may_be_put_out() -> None:
  """Of two kinds: those of up to 12 tokens, and those that may be longer."""
  checker = make(dynamic_rope_len=12, rope_counts_outputs=True, token_budget=32)
  for name, length, max_tokens, batch in (
    ('A', 8, 4, 'A[0,8)'),
    ('B', 9, 3, 'B[8,9)'),
    ('C', 9, 4, 'C[0,9)'),
    ('D', 13, 1, 'D[9,13)'),
    ('E', 9, 7, 'E[8,9)'),
    ('F', 9, 1, 'F[8,9)'),
  ):
    add(checker, name, length, ('A', 13), max_tokens=max_tokens)
    assert steps(checker)[0] == batch


@pytest.mark.parametrize(
  'fields', [{'prefix_cache': False}, {'prefix_cache_misses': True}]
)
def test_nothing_is_found_where_it_is_off(fields) -> None:
  checker = make(**fields)
  for name in 'AB':
    add(checker, name, 8, ('A', 8))
    assert steps(checker) == [f'{name}[0,8)']
  assert checker.scheduler.prefixes.num_found == 0


def test_a_failed_sequence_leaves_nothing() -> None:
  checker = make()
  scheduler = checker.scheduler
  (seq,) = scheduler.add(checker_lib.make_request('A', 8, 4))
  batch = scheduler.schedule(0.0)
  (event,) = scheduler.complete(
    batch, types.Sampled.of(batch.chunks, [1], [float('nan')])
  )
  assert event.finish_reason is types.FinishReason.ERROR and seq.is_finished
  assert scheduler.pages.num_registered == 0


def test_the_log_says_what_pages_hold_and_whose_they_are() -> None:
  """Of a model whose rotations depend on lengths beyond eight."""
  checker = make(dynamic_rope_len=8)
  checker.scheduler.prefixes.keep_log()
  add(checker, 'A', 8)
  add(checker, 'B', 12)
  add(checker, 'C', 4, cache_salt='mine')
  add(checker, 'D', 12, cache_salt='mine')
  add(checker, 'A2', 8, ('A', 8))  # Nothing new.
  steps(checker)
  log = checker.scheduler.pages.log
  assert log is not None
  logged: dict[str, list[tuple[int, ...]]] = {}
  keys: list[bytes | None] = [None]
  for page in log.follow():
    assert page.parent in keys
    keys.append(page.key)
    logged.setdefault(page.namespace, []).append(
      tuple(array.array('i', page.tokens))
    )
  of = {
    name: tuple(checker_lib.token_at(name, p) for p in range(12))
    for name in 'ABCD'
  }
  assert logged == {
    '': [of['A'][:4], of['A'][4:8]],
    ' rope_len=12': [of['B'][:4], of['B'][4:8], of['B'][8:]],
    'mine': [of['C'][:4]],
    'mine rope_len=12': [of['D'][:4], of['D'][4:8], of['D'][8:]],
  }


@pytest.mark.parametrize('num_steps', [1, 3, 5])
def test_what_runs_keeps_to_itself_what_other_weights_gave(num_steps) -> None:
  """Full pages, those in part, what is computed after them, and forks."""
  checker = make(token_budget=4)
  add(checker, 'A', 5, max_tokens=7, n=2)
  for _ in range(num_steps):
    checker.schedule()
    checker.complete()
  checker.scheduler.new_weights(keeps=True)
  steps(checker)
  assert checker.num_preempted == 0
  for fork, first in (('A', 'B[0,4)'), ('A/1', 'C[5,8)')):
    name = first[0]  # By the new ones, which the next one finds.
    add(checker, name, 8, ('A', 5), (fork, 8))
    assert steps(checker)[0] == first
    add(checker, 'D', 12, ('A', 5), (fork, 12))
    assert steps(checker) == ['D[8,12)']


def test_nobody_waits_for_what_is_kept() -> None:
  checker = make(token_budget=4, page_size=8)
  add(checker, 'A', 16, max_tokens=8)
  checker.schedule()
  add(checker, 'B', 12, ('A', 12))
  checker.complete()
  checker.scheduler.new_weights(keeps=True)
  assert steps(checker)[3] == 'A16 B[0,3)'


def test_what_is_recomputed_by_new_weights_is_found_again() -> None:
  checker = make(token_budget=16)
  add(checker, 'A', 8, max_tokens=4)
  checker.schedule()
  checker.complete()
  checker.scheduler.new_weights(keeps=True)
  checker.preempt_all()
  steps(checker)
  add(checker, 'B', 10, ('A', 10))
  assert steps(checker) == ['B[9,10)']
