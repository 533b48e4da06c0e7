# SPDX-License-Identifier: Apache-2.0
"""The serving loop, with tokens that can be checked by hand."""

from __future__ import annotations

from typing import Any

import pytest

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
    'a': [10, 11, 12, 13],
    'b': [20, 21, 22],
    'c': [99, 0, 1, 2, 3],
  }
  for deltas in found.values():
    reasons = [d.finish_reason for d in deltas]
    assert reasons == [None] * (len(reasons) - 1) + [LENGTH]
    assert [d.metrics is None for d in deltas] == [r is None for r in reasons]


@pytest.mark.parametrize('num_stages', [1, 2, 3])
@pytest.mark.parametrize('look_ahead', [False, True])
def test_a_lone_request_ends_with_any_number_of_stages(
  num_stages: int, look_ahead: bool
) -> None:
  engine = make_engine(num_stages=num_stages, look_ahead=look_ahead)
  engine.add(request('a', range(12), 5))
  assert tokens_of(finish(engine)['a']) == [12, 13, 14, 15, 16]


@pytest.mark.parametrize('look_ahead', [False, True])
def test_the_end_of_sequence_ends_it_but_is_no_stop_reason(
  look_ahead: bool,
) -> None:
  engine = make_engine(eos_token_ids=frozenset({12}), look_ahead=look_ahead)
  engine.add(request('a', [9]))
  last = finish(engine)['a'][-1]
  assert (last.token_ids, last.finish_reason, last.stop_reason) == (
    (12,),
    STOP,
    None,
  )
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
    (12,),
    STOP,
    12,
  )


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


@pytest.mark.parametrize('policy', ['sarathi', 'vllm'])
def test_preempted_requests_say_so_and_give_the_same_tokens(
  policy: str,
) -> None:
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
  policy: str, look_ahead: bool, num_steps: int
) -> None:
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
      runner=Recorder({'a': (), 'b': ()}), seed=3
    )
    engine.add(request('a', [1], 1, **sampling))
    engine.add(request('b', [1], 1, **sampling))
    finish(engine)
    return found

  assert seeds(seed=5) == [5, 5]
  drawn = seeds()
  assert drawn == seeds()
  assert drawn[0] != drawn[1]


class _NoLogits(harness.ScriptRunner):
  """Can't sample the second token of 'bad', as its logits are NaN."""

  def launch(self, batch: types.ScheduledBatch) -> types.Sampled:
    sampled = super().launch(batch)
    return sampled._replace(
      logprobs=[
        (float('nan'),)
        if (
          chunk.request_id == 'bad'
          and chunk.start + chunk.num_tokens > chunk.prompt_len
        )
        else logprobs
        for chunk, logprobs in zip(batch.chunks, sampled.logprobs, strict=True)
      ]
    )


@pytest.mark.parametrize('look_ahead', [False, True])
@pytest.mark.parametrize('policy', POLICIES)
def test_a_request_without_finite_logits_ends_alone(
  policy: str, look_ahead: bool
) -> None:
  engine = make_engine(
    policy,
    look_ahead=look_ahead,
    runner=_NoLogits(
      {'good': (1, 2, 3, 4), 'bad': (5, 6, 7, 8), 'late': (9, 10)}
    ),
  )
  for name in ('good', 'bad', 'late'):
    engine.add(request(name, [7, 8], 2 if name == 'late' else 4))
  found = finish(engine)
  assert {name: tokens_of(deltas) for name, deltas in found.items()} == {
    'good': [1, 2, 3, 4],
    'bad': [5],
    'late': [9, 10],
  }
  last = found['bad'][-1]
  assert (last.token_ids, last.logprobs, last.text) == ((), (), '')
  assert last.finish_reason is types.FinishReason.ERROR
  assert last.stop_reason is None
  assert last.metrics is not None and last.metrics.num_output_tokens == 1
  assert engine.metrics.num_generated == 7
  assert engine.metrics.finish_reasons[types.FinishReason.ERROR] == 1


def test_a_request_that_never_got_a_token_has_no_time_of_a_first() -> None:
  class Broken(harness.ScriptRunner):
    def launch(self, batch: types.ScheduledBatch) -> types.Sampled:
      sampled = super().launch(batch)
      return sampled._replace(logprobs=[(float('nan'),)] * len(sampled.tokens))

  engine = make_engine(runner=Broken({'a': ()}))
  engine.add(request('a', [7], 4))
  (delta,) = finish(engine)['a']
  assert delta.metrics is not None and delta.metrics.ttft_s is None
  assert engine.metrics.ttft_s.count == 0


@pytest.mark.parametrize(
  ('fields', 'tokens', 'reason', 'stop_reason'),
  [
    (dict(max_tokens=4), [11, 12, 13, 14], LENGTH, None),
    (dict(max_tokens=2), [11, 12], LENGTH, None),
    (dict(stop_token_ids=(13,)), [11, 12, 13], STOP, 13),
  ],
)
def test_a_step_may_give_several_tokens(
  fields: dict[str, Any],
  tokens: list[int],
  reason: types.FinishReason,
  stop_reason: int | None,
) -> None:
  """None of those after the one that ends the request is told."""

  class Several(harness.ScriptRunner):
    def launch(self, batch: types.ScheduledBatch) -> types.Sampled:
      return types.Sampled([(11, 12, 13, 14)], [(-1.0, -2.0, -3.0, -4.0)])

  engine = make_engine(runner=Several({}))
  engine.add(request('a', [7], **fields))
  (delta,) = finish(engine)['a']
  assert tokens_of([delta]) == tokens
  assert delta.logprobs == (-1.0, -2.0, -3.0, -4.0)[: len(tokens)]
  assert (delta.finish_reason, delta.stop_reason) == (reason, stop_reason)
  assert delta.metrics is not None
  assert delta.metrics.num_output_tokens == len(tokens)
  assert engine.metrics.num_generated == len(tokens)


def test_of_several_tokens_one_without_finite_logits_voids_all() -> None:
  class Several(harness.ScriptRunner):
    def launch(self, batch: types.ScheduledBatch) -> types.Sampled:
      return types.Sampled([(11, 12)], [(-1.0, float('nan'))])

  engine = make_engine(runner=Several({}))
  engine.add(request('a', [7], 4))
  (delta,) = finish(engine)['a']
  assert (delta.token_ids, delta.finish_reason) == (
    (),
    types.FinishReason.ERROR,
  )
  assert engine.metrics.num_generated == 0


def test_what_was_sampled_is_shared_out_among_the_chunks() -> None:
  chunk = types.Chunk(
    'a', 0, 0, (), 1, (), False, 1, 1, 0, types.SamplingParams()
  )
  chunks = [chunk._replace(samples=n) for n in (1, 0, 2, 1)]
  assert types.Sampled.of(
    chunks, [5, 6, 7, 8], [-1.0, -2.0, -3.0, -4.0]
  ) == types.Sampled(
    [(5,), (), (6, 7), (8,)], [(-1.0,), (), (-2.0, -3.0), (-4.0,)]
  )
