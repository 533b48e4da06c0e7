# SPDX-License-Identifier: Apache-2.0
"""Slots of requests whose logits are adjusted, and what sets them up."""

from __future__ import annotations

import pytest

from sarathi_jax import config as config_lib
from sarathi_jax import errors
from sarathi_jax import scheduler as scheduler_lib
from sarathi_jax import types

PLAIN = types.SamplingParams(max_tokens=8)
ADJUSTED = types.SamplingParams(
  max_tokens=8, min_tokens=3, stop_token_ids=(7,), presence_penalty=1.0
)


def make(
  max_adjusted_seqs: int | None, num_pages: int = 64
) -> scheduler_lib.Scheduler:
  return scheduler_lib.POLICIES['sarathi'](
    config_lib.SchedulerConfig(
      token_budget=16,
      max_num_seqs=4,
      max_model_len=16,
      num_pages=num_pages,
      page_size=4,
      look_ahead=False,
      eos_token_ids=(9,),
      max_adjusted_seqs=max_adjusted_seqs,
      prefix_cache=False,
    )
  )


def add(
  scheduler: scheduler_lib.Scheduler,
  name: str,
  sampling: types.SamplingParams,
  prompt: tuple[int, ...] = (1, 2),
) -> None:
  scheduler.add(
    types.Request(request_id=name, prompt_token_ids=prompt, sampling=sampling),
    ((3, 4),) if sampling.is_adjusted else (),
  )


def run(
  scheduler: scheduler_lib.Scheduler, token: int = 5
) -> types.ScheduledBatch:
  batch = scheduler.schedule(0.0)
  num = sum(chunk.samples for chunk in batch.chunks)
  scheduler.complete(
    batch, types.Sampled.of(batch.chunks, [token] * num, [0.0] * num)
  )
  return batch


def slots(batch: types.ScheduledBatch) -> dict[str, int]:
  return {chunk.request_id: chunk.slot for chunk in batch.chunks}


def test_adjusted_requests_have_the_first_slots_and_others_the_rest() -> None:
  scheduler = make(2)
  for name, sampling in (
    ('a', PLAIN),
    ('b', ADJUSTED),
    ('c', PLAIN),
    ('d', ADJUSTED),
  ):
    add(scheduler, name, sampling)
  got = slots(run(scheduler))
  assert sorted((got['b'], got['d'])) == [0, 1]
  assert sorted((got['a'], got['c'])) == [2, 3]


def test_others_may_have_the_first_slots_where_these_are_left() -> None:
  scheduler = make(2)
  for name in 'abcd':
    add(scheduler, name, PLAIN)
  assert sorted(slots(run(scheduler)).values()) == [0, 1, 2, 3]
  add(scheduler, 'e', ADJUSTED)
  for _ in range(7):
    assert 'e' not in slots(run(scheduler))
  assert slots(run(scheduler)) in ({'e': 0}, {'e': 1})


def test_more_than_there_are_slots_wait() -> None:
  scheduler = make(1)
  add(scheduler, 'a', ADJUSTED)
  add(scheduler, 'b', ADJUSTED)
  for _ in range(8):
    assert slots(run(scheduler)) == {'a': 0}
  assert slots(run(scheduler)) == {'b': 0}


def test_none_may_mean_all_and_zero_refuses_by_name() -> None:
  scheduler = make(None)
  for name in 'abcd':
    add(scheduler, name, ADJUSTED)
  assert sorted(slots(run(scheduler)).values()) == [0, 1, 2, 3]
  request = types.Request(
    request_id='x', prompt_token_ids=(1,), sampling=ADJUSTED
  )
  with pytest.raises(errors.UnsupportedError, match='max_adjusted_seqs=0'):
    make(0).check(request)
  make(1).check(request)


def test_a_slot_is_set_up_once_with_the_first_chunk_of_each_admission() -> None:
  """And with the output too, when it is admitted again."""
  scheduler = make(2)
  add(scheduler, 'a', ADJUSTED, tuple(range(10)))
  add(scheduler, 'b', PLAIN, tuple(range(8)))
  ends, words = (9, 7), ((3, 4),)
  (a, b), *rest = (run(scheduler).chunks for _ in range(3))
  assert a.setup == types.SlotSetup(tuple(range(10)), ends, words)
  assert b.setup is None
  assert all(chunk.setup is None for chunks in rest for chunk in chunks)
  scheduler.preempt_all()
  again = {c.request_id: c for c in run(scheduler).chunks}
  assert again['a'].setup == types.SlotSetup((*range(10), 5, 5, 5), ends, words)
  assert 'b' not in again or again['b'].setup is None


def test_ends_are_the_models_and_the_requests_if_a_length_is_asked() -> None:
  scheduler = make(2)
  add(
    scheduler,
    'a',
    types.SamplingParams(presence_penalty=1.0, stop_token_ids=(7,)),
  )
  (chunk,) = run(scheduler).chunks
  assert chunk.setup is not None and chunk.setup.end_ids == ()
