# SPDX-License-Identifier: Apache-2.0
"""The serving loop, with tokens and times that can be checked by hand."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from sarathi_jax import errors
from sarathi_jax import scheduler as scheduler_lib
from sarathi_jax import types
from sarathi_jax.engine import engine as engine_lib
from tests.engine import harness

LENGTH, STOP = types.FinishReason.LENGTH, types.FinishReason.STOP
POLICIES = tuple(scheduler_lib.POLICIES)

finish, make_engine = harness.finish, harness.make_engine
request, step = harness.make_request, harness.step
tokens_of = harness.tokens_of


@pytest.mark.parametrize('look_ahead', [False, True])
@pytest.mark.parametrize('policy', POLICIES)
def test_tokens_by_hand(policy: str, look_ahead: bool) -> None:
  engine = make_engine(policy, look_ahead=look_ahead, num_pages=10)
  engine.add(request('a', [7, 8, 9], 4))
  engine.add(request('b', range(20), 3))
  engine.add(request('c', [98], 5))
  found = finish(engine)
  assert {k: tokens_of(d) for k, d in found.items()} == {
    'a': [10, 11, 12, 13], 'b': [20, 21, 22], 'c': [99, 0, 1, 2, 3]}
  for deltas in found.values():
    reasons = [d.finish_reason for d in deltas]
    assert reasons == [None] * (len(reasons) - 1) + [LENGTH]
    assert [d.metrics is None for d in deltas] == [r is None for r in reasons]


@pytest.mark.parametrize('num_stages', [1, 2, 3])
@pytest.mark.parametrize('look_ahead', [False, True])
def test_a_lone_request_ends_with_any_number_of_stages(
    num_stages: int, look_ahead: bool) -> None:
  engine = make_engine(num_stages=num_stages, look_ahead=look_ahead)
  engine.add(request('a', range(12), 5))
  assert tokens_of(finish(engine)['a']) == [12, 13, 14, 15, 16]


@pytest.mark.parametrize('look_ahead', [False, True])
def test_the_end_of_sequence_ends_it_but_is_no_stop_reason(
    look_ahead: bool) -> None:
  engine = make_engine(eos_token_ids=frozenset({12}), look_ahead=look_ahead)
  engine.add(request('a', [9]))
  last = finish(engine)['a'][-1]
  assert (last.token_ids, last.finish_reason, last.stop_reason) == (
    (12,), STOP, None)
  assert last.metrics is not None
  assert last.metrics.num_output_tokens == 3


def test_ignore_eos_goes_on() -> None:
  engine = make_engine(eos_token_ids=frozenset({12}))
  engine.add(request('a', [9], 6, ignore_eos=True))
  deltas = finish(engine)['a']
  assert tokens_of(deltas) == [10, 11, 12, 13, 14, 15]
  assert deltas[-1].finish_reason is LENGTH


def test_ignore_eos_does_not_ignore_stop_token_ids() -> None:
  engine = make_engine(eos_token_ids=frozenset({12}))
  engine.add(request('a', [9], stop_token_ids=(14, 12), ignore_eos=True))
  last = finish(engine)['a'][-1]
  assert (last.token_ids, last.finish_reason, last.stop_reason) == (
    (12,), STOP, 12)


@pytest.mark.parametrize('look_ahead', [False, True])
def test_a_stop_token_ends_it_and_is_included(look_ahead: bool) -> None:
  engine = make_engine(look_ahead=look_ahead)
  engine.add(request('a', [9], stop_token_ids=(30, 12)))
  deltas = finish(engine)['a']
  assert tokens_of(deltas) == [10, 11, 12]
  assert deltas[-1].stop_reason == 12


def test_a_stop_token_at_the_very_end_is_a_stop() -> None:
  engine = make_engine()
  engine.add(request('a', [9], 3, stop_token_ids=(12,)))
  last = finish(engine)['a'][-1]
  assert (last.finish_reason, last.stop_reason) == (STOP, 12)


@pytest.mark.parametrize('max_tokens', [None, 1000])
def test_the_context_ends_it(max_tokens: int | None) -> None:
  engine = make_engine(max_model_len=10)
  engine.add(request('a', range(7), max_tokens))
  deltas = finish(engine)['a']
  assert tokens_of(deltas) == [7, 8, 9]
  assert deltas[-1].finish_reason is LENGTH


@pytest.mark.parametrize('look_ahead', [False, True])
@pytest.mark.parametrize('num_steps', range(7))
def test_an_abort_at_any_moment_frees_the_pages(
    num_steps: int, look_ahead: bool) -> None:
  """Waiting, between chunks of its prefill, at each decode."""
  engine = make_engine(look_ahead=look_ahead)
  engine.add(request('other', [50, 51], 9))
  engine.add(request('a', range(20), 5))
  deltas = [d for _ in range(num_steps) for d in step(engine)]
  assert engine.abort('a')
  computed = 2 + (num_steps - 1) + look_ahead if num_steps else 0
  assert engine.stats().num_free_pages == 64 - math.ceil(computed / 4)
  assert not engine.abort('a')
  rest = finish(engine)
  assert 'a' not in rest  # No delta follows.
  others = [d for d in deltas if d.request_id == 'other'] + rest['other']
  assert tokens_of(others) == list(range(52, 61))
  assert engine.metrics.num_aborted == 1


def test_an_aborted_id_may_be_used_again_at_once() -> None:
  engine = make_engine(look_ahead=True)
  engine.add(request('a', [10], 9))
  step(engine)
  assert engine.abort('a')
  engine.add(request('a', [20], 2))  # The old one is still in flight.
  assert tokens_of(finish(engine)['a']) == [21, 22]


def test_no_delta_follows_an_abort_after_a_drain() -> None:
  engine = make_engine(look_ahead=True)
  engine.add(request('a', [10], 9))
  engine.add(request('b', [20], 9))
  step(engine)
  engine.drain()
  assert engine.abort('a')
  assert list(finish(engine)) == ['b']


def test_aborting_what_is_unknown_or_done() -> None:
  engine = make_engine()
  assert not engine.abort('nobody')
  engine.add(request('a', [1], 1))
  finish(engine)
  assert not engine.abort('a')
  assert engine.metrics.num_aborted == 0


def test_metrics_by_hand() -> None:
  """b waits for one of two slots; each step takes a second."""
  clock = harness.Clock()
  engine = make_engine(
    clock=clock, token_budget=4, max_num_seqs=1, short_prompt_share=0.0)
  engine.add(request('a', range(6), 3))
  clock.now = 0.5
  engine.add(request('b', [9], 2, arrival_time=0.25))
  found = finish(engine)
  # Steps at 0.5: a[0,4), 1.5: a[4,6), 2.5: a6, 3.5: a7, 4.5: b[0,1), 5.5: b1.
  assert found['a'][-1].metrics == types.RequestMetrics(
    num_prompt_tokens=6, num_output_tokens=3, num_preemptions=0,
    scheduling_delay_s=0.5, ttft_s=1.5, tpot_s=1.0, e2e_s=3.5, max_tbt_s=1.0)
  assert found['b'][-1].metrics == types.RequestMetrics(
    num_prompt_tokens=1, num_output_tokens=2, num_preemptions=0,
    scheduling_delay_s=4.25, ttft_s=4.25, tpot_s=1.0, e2e_s=5.25,
    max_tbt_s=1.0)
  metrics = engine.metrics
  assert (metrics.num_steps, metrics.num_scheduled_tokens) == (6, 10)
  assert (metrics.num_prompt_tokens, metrics.num_output_tokens) == (7, 5)
  assert (metrics.num_finished, metrics.num_aborted) == (2, 0)
  assert (metrics.ttft_s.count, metrics.tbt_s.count) == (2, 3)
  assert metrics.scheduling_delay_s.total == 4.75


def test_the_longest_gap_between_tokens_shows() -> None:
  clock = harness.Clock()
  engine = make_engine(clock=clock)
  engine.add(request('a', [1], 4))
  for gap in (0.5, 3.0, 0.25):
    engine.step()
    clock.now += gap
  metrics = finish(engine)['a'][-1].metrics
  assert metrics is not None
  assert metrics.max_tbt_s == 3.0
  assert metrics.tpot_s == 3.75 / 3


def test_a_single_token_has_no_time_between_tokens() -> None:
  engine = make_engine()
  engine.add(request('a', [1], 1))
  metrics = finish(engine)['a'][-1].metrics
  assert metrics is not None
  assert (metrics.ttft_s, metrics.tpot_s, metrics.max_tbt_s) == (0, None, None)


@pytest.mark.parametrize('policy', ['sarathi', 'vllm'])
def test_preempted_requests_say_so_and_give_the_same_tokens(
    policy: str) -> None:
  engine = make_engine(policy, num_pages=8, look_ahead=True)
  for i in range(4):
    engine.add(request(f'r{i}', [10 * i, 10 * i + 1], 20))
  found = finish(engine)
  num_preemptions = 0
  for i in range(4):
    deltas = found[f'r{i}']
    assert tokens_of(deltas) == list(range(10 * i + 2, 10 * i + 22))
    assert deltas[-1].metrics is not None
    assert deltas[-1].metrics.num_output_tokens == 20
    num_preemptions += deltas[-1].metrics.num_preemptions
  assert num_preemptions == engine.stats().num_preemptions > 0


@pytest.mark.parametrize('policy', POLICIES)
@pytest.mark.parametrize('look_ahead', [False, True])
@pytest.mark.parametrize('num_steps', range(6))
def test_forgetting_the_cache_does_not_change_the_tokens(
    policy: str, look_ahead: bool, num_steps: int) -> None:
  engine = make_engine(policy, look_ahead=look_ahead)
  engine.add(request('a', range(12), 5))
  engine.add(request('b', [50], 2))
  deltas = [d for _ in range(num_steps) for d in step(engine)]
  engine.invalidate_cache()
  stats = engine.stats()
  assert stats.num_free_pages == stats.num_pages
  assert (stats.num_running, stats.num_in_flight) == (0, 0)
  found = finish(engine, deltas)
  assert tokens_of(found['a']) == [12, 13, 14, 15, 16]
  assert tokens_of(found['b']) == [51, 52]


def test_every_request_is_recomputed_after_the_cache_is_forgotten() -> None:
  batches: list[types.ScheduledBatch] = []

  class Recorder(harness.ScriptRunner):
    def launch(self, batch: types.ScheduledBatch) -> types.Sampled:
      batches.append(batch)
      return super().launch(batch)

  engine = make_engine(runner=Recorder({'a': (1, 2, 3, 4)}))
  engine.add(request('a', [7, 8], 4))
  step(engine)
  step(engine)
  engine.invalidate_cache()
  assert tokens_of(finish(engine)['a']) == [3, 4]
  chunks = [(c.start, c.tokens) for b in batches for c in b.chunks]
  assert chunks == [(0, (7, 8)), (2, (1,)), (0, (7, 8, 1, 2)), (4, (3,))]


def test_drained_outputs_are_returned_by_the_next_step() -> None:
  engine = make_engine(look_ahead=True)
  engine.add(request('a', [10], 3))
  deltas = step(engine)
  engine.drain()
  assert engine.stats().num_in_flight == 0
  assert engine.has_work
  assert tokens_of(finish(engine, deltas)['a']) == [11, 12, 13]


BAD: tuple[tuple[types.Request, type[Exception], str], ...] = (
  (request('r', []), errors.InvalidRequestError, 'r: the prompt is empty'),
  (request('r', range(32)), errors.InvalidRequestError,
   'r: a prompt of 32 tokens leaves no room'),
  (request('r', [1, 100]), errors.InvalidRequestError,
   'r: prompt_token_ids has the unknown token id 100; ids must be in [0, 100)'),
  (request('r', [-1, 2]), errors.InvalidRequestError, 'token id -1'),
  (request('r', [1.5]), errors.InvalidRequestError,  # type: ignore
   'r: prompt_token_ids has 1.5; token ids must be integers'),
  (request('r', [True]), errors.InvalidRequestError,
   'r: prompt_token_ids has True; token ids must be integers'),
  (request('r', ['a']), errors.InvalidRequestError,  # type: ignore
   "r: prompt_token_ids has 'a'; token ids must be integers"),
  (request('r', [1], stop_token_ids=(3, 100)), errors.InvalidRequestError,
   'r: stop_token_ids has the unknown token id 100'),
  (request('r', [1], stop=('x',)), errors.UnsupportedError,
   "stop=('x',): this model has no tokenizer"),
  (request('taken', [1]), errors.InvalidRequestError,
   "request_id='taken': a request of this id is running or waiting"),
)


@pytest.mark.parametrize(('bad', 'error', 'message'), BAD)
def test_a_bad_request_is_refused_and_the_engine_goes_on(
    bad: types.Request, error: type[Exception], message: str) -> None:
  engine = make_engine()
  engine.add(request('taken', [10], 3))
  step(engine)
  with pytest.raises(error) as caught:
    engine.add(bad)
  assert message in str(caught.value)
  assert list(finish(engine)) == ['taken']


@pytest.mark.parametrize('bad', [b for b, _, _ in BAD[:-1]])
def test_check_refuses_what_add_refuses(bad: types.Request) -> None:
  engine = make_engine()
  with pytest.raises(errors.InvalidRequestError):
    engine.check(bad)
  assert not engine.has_work


def test_an_id_may_be_used_again_when_its_request_is_done() -> None:
  engine = make_engine()
  engine.add(request('a', [1], 1))
  finish(engine)
  engine.add(request('a', [5], 1))
  assert tokens_of(finish(engine)['a']) == [6]


def test_stats() -> None:
  engine = make_engine(max_num_seqs=2, look_ahead=True)
  for name in 'abc':
    engine.add(request(name, [1, 2, 3, 4, 5], 9))
  step(engine)
  stats = dataclasses.asdict(engine.stats())
  expected = dict(
    num_running=2, num_waiting=1, num_in_flight=1, num_pages=64,
    num_free_pages=60, num_preemptions=0, num_steps=2, padding_waste=0.0)
  assert {name: stats[name] for name in expected} == expected


def test_padding_is_counted() -> None:
  class Padded(harness.ScriptRunner):
    def num_rows(self, num_tokens: int) -> int:
      return 8

  engine = make_engine(runner=Padded({'a': (1, 2)}))
  engine.add(request('a', [1, 2, 3], 2))
  finish(engine)
  assert engine.stats().padding_waste == (5 + 7) / 16


def test_without_work_a_step_is_empty() -> None:
  engine = make_engine()
  assert not engine.has_work
  assert engine.step() == []


def test_seeds_are_the_requests_own_or_the_engines() -> None:
  def seeds(**sampling: Any) -> list[int]:
    found: list[int] = []

    class Recorder(harness.ScriptRunner):
      def launch(self, batch: types.ScheduledBatch) -> types.Sampled:
        found.extend(c.seed for c in batch.chunks)
        return super().launch(batch)

    engine: engine_lib.Engine = make_engine(
      runner=Recorder({'a': (), 'b': ()}), seed=3)
    engine.add(request('a', [1], 1, **sampling))
    engine.add(request('b', [1], 1, **sampling))
    finish(engine)
    return found

  assert seeds(seed=5) == [5, 5]
  drawn = seeds()
  assert drawn == seeds()
  assert drawn[0] != drawn[1]
