# SPDX-License-Identifier: Apache-2.0
"""Adapters share slots; who finds none waits, and nobody waits for it."""

from __future__ import annotations

import random

import pytest

from sarathi_jax import config as config_lib
from sarathi_jax import scheduler as scheduler_lib
from sarathi_jax import types
from sarathi_jax.scheduler import adapter_slots

A, B, C = (types.Adapter(name, 0, {}) for name in 'abc')


def make(
  max_loras: int, policy: str = 'sarathi', **fields: object
) -> scheduler_lib.Scheduler:
  return scheduler_lib.POLICIES[policy](
    config_lib.SchedulerConfig(
      **dict(
        token_budget=32,
        max_num_seqs=8,
        max_model_len=32,
        num_pages=64,
        page_size=4,
        look_ahead=False,
        max_loras=max_loras,
      )
      | fields
    )
  )


def add(
  scheduler: scheduler_lib.Scheduler,
  name: str,
  adapter: types.Adapter | None,
  num: int = 2,
  n: int = 1,
) -> None:
  scheduler.add(
    types.Request(
      request_id=name,
      prompt_token_ids=(1, 2, 3, 4, 5),
      sampling=types.SamplingParams(max_tokens=num, n=n),
      adapter=adapter,
    )
  )


def run(scheduler: scheduler_lib.Scheduler) -> types.ScheduledBatch:
  batch = scheduler.schedule(0.0)
  num = sum(chunk.samples for chunk in batch.samplers)
  scheduler.complete(
    batch, types.Sampled.of(batch.samplers, [7] * num, [0.0] * num)
  )
  return batch


def numbers(batch: types.ScheduledBatch) -> dict[str, int]:
  return {chunk.request_id: chunk.adapter for chunk in batch.samplers}


def test_sequences_of_an_adapter_share_its_slot() -> None:
  scheduler = make(2, prefix_cache=False)
  add(scheduler, '1', A, n=2)
  add(scheduler, '2', B)
  add(scheduler, '3', A)
  add(scheduler, '4', None)
  batch = run(scheduler)
  assert numbers(batch) == {'1': 1, '2': 2, '3': 1, '4': 0, '1/1': 1}
  assert batch.loads == ((0, A), (1, B))
  assert run(scheduler).loads == ()


def test_who_finds_no_slot_waits_and_others_pass() -> None:
  scheduler = make(1, prefix_cache=False)
  for name, adapter in (('1', A), ('2', B), ('3', None), ('4', A), ('5', B)):
    add(scheduler, name, adapter)
  assert numbers(run(scheduler)) == {'1': 1, '3': 0, '4': 1}
  run(scheduler)
  batch = run(scheduler)
  assert numbers(batch) == {'2': 1, '5': 1}
  assert batch.loads == ((0, B),)


@pytest.mark.parametrize('window', [1, 3])
@pytest.mark.parametrize('policy', scheduler_lib.POLICIES)
def test_who_waits_for_a_slot_is_passed_by_so_many(
  policy: str, window: int
) -> None:
  """However many come for what is there; who needs no slot goes on."""
  scheduler = make(1, policy=policy, max_num_seqs=4, cache_aware_window=window)
  add(scheduler, 'a', A)
  add(scheduler, 'b', B)
  began: list[str] = []
  for i in range(40):
    if i % 2:  # Some policies compute nothing else while prompts come.
      add(scheduler, f'a{i}', A, num=3)
      add(scheduler, f'none{i}', None, num=1)
    began += numbers(run(scheduler))
    if 'b' in began:
      break
  before_b = {name for name in began if name[0] == 'a'} - {'a'}
  assert 'b' in began and len(before_b) <= 4
  assert any(name.startswith('none') for name in began)


def test_the_one_that_was_not_used_for_the_longest_goes() -> None:
  scheduler = make(2)
  loads = []
  for adapter in (A, B, A, C, A, B):
    add(scheduler, 'x', adapter, num=1)
    loads += run(scheduler).loads
  assert loads == [(0, A), (1, B), (1, C), (1, B)]


def test_what_is_loaded_anew_is_another() -> None:
  """And finds nothing in the cache that the one before left there."""
  scheduler = make(2)
  again = types.Adapter('a', 1, {})
  found = []
  for adapter in (A, A, again, again, B, None, None):
    add(scheduler, 'x', adapter, num=1)
    before = scheduler.prefixes.num_found
    run(scheduler)
    found.append(scheduler.prefixes.num_found - before)
  assert found == [0, 4, 0, 4, 0, 0, 4]


def test_a_fault_empties_all_slots() -> None:
  scheduler = make(1)
  add(scheduler, '1', A)
  assert scheduler.schedule(0.0).loads == ((0, A),)
  scheduler.forget_in_flight()
  assert run(scheduler).loads == ((0, A),)


@pytest.mark.parametrize('num', [1, 2, 3])
def test_slots_are_never_taken_from_who_uses_them(num: int) -> None:
  rng = random.Random(num)
  slots = adapter_slots.AdapterSlots(num, 4)
  on_device: dict[int, types.Adapter] = {}
  used: list[tuple[int, types.Adapter]] = []
  for _ in range(2000):
    adapter = rng.choice((A, B, C))
    if slots.has_room(adapter) and rng.random() < 0.5:
      number = slots.take(adapter)
      on_device.update(slots.take_loads())
      used.append((number, adapter))
    elif used:
      slots.give_back(used.pop(rng.randrange(len(used)))[0])
    assert all(on_device[n - 1] is held for n, held in used)
    taken = {n for n, _ in used}
    free = len(taken) < num
    for one in (A, B, C):
      assert slots.has_room(one) or not (free or one in {h for _, h in used})


@pytest.mark.parametrize('policy', scheduler_lib.POLICIES)
def test_each_chunk_has_its_own_adapter(policy: str) -> None:
  """Under every policy, preempted or not; and nobody waits for ever."""
  for seed in range(12):
    rng = random.Random(seed)
    scheduler = scheduler_lib.POLICIES[policy](
      config_lib.SchedulerConfig(
        token_budget=12,
        max_num_seqs=rng.randint(1, 6),
        max_model_len=32,
        num_pages=rng.choice((8, 64)),
        page_size=4,
        max_loras=rng.randint(1, 3),
        cache_aware_window=rng.randint(1, 3),
      )
    )
    asked = {str(i): rng.choice((A, B, C, None)) for i in range(20)}
    for name, adapter in asked.items():
      scheduler.add(
        types.Request(
          request_id=name,
          prompt_token_ids=tuple(rng.choices((1, 2), k=rng.randint(1, 12))),
          sampling=types.SamplingParams(max_tokens=rng.randint(1, 12)),
          adapter=adapter,
        )
      )
    on_device: dict[int, types.Adapter] = {}
    left = set(asked)
    in_flight: list[types.ScheduledBatch] = []
    for _ in range(2000):
      batch = scheduler.schedule(0.0)
      on_device.update(batch.loads)
      for chunk in batch.chunks:
        got = on_device[chunk.adapter - 1] if chunk.adapter else None
        assert got is asked[chunk.request_id]
      in_flight += [batch] if batch.chunks else []
      if in_flight and (not batch.chunks or rng.random() < 0.5):
        done = in_flight.pop(0)
        num = sum(chunk.samples for chunk in done.samplers)
        events = scheduler.complete(
          done, types.Sampled.of(done.samplers, [7] * num, [0.0] * num)
        )
        left -= {e.request_id for e in events if e.finish_reason}
      if not left:
        break
    assert not left and scheduler.is_idle
