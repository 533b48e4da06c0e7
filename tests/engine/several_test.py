# SPDX-License-Identifier: Apache-2.0
"""Requests of several outputs: each its own, and all of one request."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
from typing import Any

import pytest

from sarathi_jax import errors
from sarathi_jax import scheduler as scheduler_lib
from sarathi_jax import types
from sarathi_jax.engine import engine as engine_lib
from tests import naive
from tests.engine import harness

POLICIES = tuple(scheduler_lib.POLICIES)
request = harness.make_request
step = harness.step

# What each output samples; past the end, 0.
SCRIPT = {
  'r': (11, 12, 13, 14),
  'r/1': (21, 22, 23, 24),
  'r/2': (31, 32, 33, 34),
  'other': (41, 42, 43, 44),
}


def make_engine(
  policy: str = 'sarathi',
  runner: Callable[[Any], engine_lib.Runner] = harness.ScriptRunner,
  **fields: Any,
) -> engine_lib.Engine:
  return harness.make_engine(policy, runner=runner(SCRIPT), **fields)


def finish(
  engine: engine_lib.Engine, deltas: list[types.OutputDelta] | None = None
) -> dict[tuple[str, int], list[types.OutputDelta]]:
  """Runs to the end; deltas by request and output."""
  found: dict[tuple[str, int], list[types.OutputDelta]] = {}
  for of_request in harness.finish(engine, deltas or ()).values():
    ends = [d.ends_request for d in of_request]
    assert ends == [False] * (len(ends) - 1) + [True]
    for delta in of_request:
      found.setdefault((delta.request_id, delta.output_index), []).append(delta)
  return found


def tokens_of(
  found: dict[tuple[str, int], list[types.OutputDelta]],
) -> dict[tuple[str, int], list[int]]:
  return {key: harness.tokens_of(deltas) for key, deltas in found.items()}


@pytest.mark.parametrize('look_ahead', [False, True])
@pytest.mark.parametrize('policy', POLICIES)
def test_each_output_has_its_own_tokens(policy: str, look_ahead: bool) -> None:
  engine = make_engine(policy, look_ahead=look_ahead)
  engine.add(request('r', range(10), 4, n=3))
  engine.add(request('other', [1, 2], 3))
  found = finish(engine)
  assert tokens_of(found) == {
    ('r', 0): [11, 12, 13, 14],
    ('r', 1): [21, 22, 23, 24],
    ('r', 2): [31, 32, 33, 34],
    ('other', 0): [41, 42, 43],
  }
  left = {index: found['r', index][-1].num_left for index in range(3)}
  assert left == {0: 2, 1: 1, 2: 0}


def test_a_prompt_counts_once_and_each_output() -> None:
  engine = make_engine()
  engine.add(request('r', range(10), 4, n=3))
  step(engine)
  assert engine.stats().num_running == 3
  found = finish(engine)
  stats, metrics = engine.stats(), engine.metrics
  assert stats.num_prefilled == 10
  assert (stats.num_generated, stats.num_finished) == (12, 3)
  assert (metrics.num_prompt_tokens, metrics.num_output_tokens) == (10, 12)
  assert metrics.prompt_len.count == 1 and metrics.output_len.count == 3
  assert metrics.ttft_s.count == metrics.e2e_s.count == 3
  # 8 tokens, then 2, from which all begin; 3 decodes more.
  assert (metrics.num_steps, metrics.num_scheduled_tokens) == (5, 10 + 9)
  times = [found['r', i][-1].metrics for i in range(3)]
  assert all(t is not None and t.num_prompt_tokens == 10 for t in times)
  assert {t.ttft_s for t in times if t} == {1.0}


def test_what_is_preempted_is_not_counted_again() -> None:
  engine = make_engine(look_ahead=True)
  engine.add(request('r', range(10), 4, n=3))
  deltas = [d for _ in range(3) for d in step(engine)]
  engine.invalidate_cache()
  found = finish(engine, deltas)
  assert tokens_of(found)['r', 2] == [31, 32, 33, 34]
  assert engine.stats().num_prefilled == 10
  assert engine.metrics.num_prompt_tokens == 10


def test_an_output_that_stops_ends_alone() -> None:
  engine = make_engine()
  engine.add(request('r', [1], 4, n=3, stop_token_ids=(22,)))
  found = finish(engine)
  assert tokens_of(found) == {
    ('r', 0): [11, 12, 13, 14],
    ('r', 1): [21, 22],
    ('r', 2): [31, 32, 33, 34],
  }
  assert found['r', 1][-1].finish_reason is types.FinishReason.STOP
  assert found['r', 1][-1].num_left == 2


def test_a_stop_string_ends_its_output_alone() -> None:
  engine = harness.make_engine(
    runner=harness.ScriptRunner(SCRIPT), tokenizer=naive.make_tokenizer(100)
  )
  engine.add(request('r', [1], 4, n=2, stop=('t22',)))
  found = finish(engine)
  assert harness.text_of(found['r', 0]).split() == ['t11', 't12', 't13', 't14']
  assert harness.text_of(found['r', 1]).split() == ['t21']
  assert found['r', 1][-1].stop_reason == 't22'


@pytest.mark.parametrize('num_steps', range(5))
@pytest.mark.parametrize('policy', POLICIES)
def test_an_abort_ends_all_outputs(policy: str, num_steps: int) -> None:
  engine = make_engine(policy, look_ahead=True)
  engine.add(request('r', range(10), 6, n=3, stop_token_ids=(21,)))
  engine.add(request('other', [1, 2], 4))
  deltas = [d for _ in range(num_steps) for d in step(engine)]
  of_r = [d for d in deltas if d.request_id == 'r']
  ended = {d.output_index for d in of_r if d.finish_reason}
  num = sum(len(d.token_ids) for d in of_r if d.output_index not in ended)
  assert engine.num_output('r') == num
  assert engine.abort('r')
  assert not engine.abort('r')
  assert engine.metrics.num_aborted == 3 - len(ended)
  found = harness.finish(engine, [d for d in deltas if d.request_id != 'r'])
  assert found.keys() == {'other'}
  assert harness.tokens_of(found['other']) == [41, 42, 43, 44]


class _Fails(harness.ScriptRunner):
  """Fails in the step that `fault` is set for."""

  fault: Exception | None = None

  def fetch(self, pending: types.Sampled) -> types.Sampled:
    if self.fault is not None:
      fault, self.fault = self.fault, None
      raise fault
    return super().fetch(pending)


@pytest.mark.parametrize('num_steps', [0, 1, 2])
def test_a_step_that_fails_ends_the_requests_whose_outputs_were_in_it(
  num_steps: int,
) -> None:
  runner = _Fails(SCRIPT)
  engine = harness.make_engine(runner=runner)
  engine.add(request('r', range(4), 4, n=3))
  for _ in range(num_steps):
    step(engine)
  engine.add(request('other', [1, 2], 4, arrival_time=1e9))
  runner.fault = fault = RuntimeError('gone')
  with pytest.raises(RuntimeError):
    engine.step()
  assert engine.recover(fault) == ['r']
  assert engine.stats().num_running == 0
  assert engine.stats().num_free_pages == engine.stats().num_pages
  assert not engine.abort('r')


def test_an_output_that_has_ended_is_no_culprit() -> None:
  """Its last token is not known when it is launched once more."""
  runner = _Fails(SCRIPT)
  engine = harness.make_engine(runner=runner, look_ahead=True)
  engine.add(request('r', [1], 1, n=2))
  engine.add(request('other', [1, 2], 4))
  deltas = step(engine)
  assert sum(d.finish_reason is not None for d in deltas) == 2
  runner.fault = fault = RuntimeError('gone')
  with pytest.raises(RuntimeError):
    engine.step()
  assert engine.recover(fault) == ['other']


class _NoLogits(harness.ScriptRunner):
  """The logits of the third output are NaN at its second token."""

  def launch(self, batch: types.ScheduledBatch) -> types.Sampled:
    sampled = super().launch(batch)
    return sampled._replace(
      logprobs=[
        (float('nan'),) if tokens == (32,) else logprobs
        for tokens, logprobs in zip(
          sampled.tokens, sampled.logprobs, strict=True
        )
      ]
    )


def test_an_output_without_finite_logits_ends_alone() -> None:
  engine = make_engine(runner=_NoLogits)
  engine.add(request('r', [1], 4, n=3))
  found = finish(engine)
  assert found['r', 2][-1].finish_reason is types.FinishReason.ERROR
  assert tokens_of(found)['r', 1] == [21, 22, 23, 24]
  assert found['r', 0][-1].num_left == 1


class _NoLogitsOfPrompt(harness.ScriptRunner):
  """The logits of the first chunk are NaN."""

  def launch(self, batch: types.ScheduledBatch) -> types.Sampled:
    nan = types.TokenLogprobs((0,), (float('nan'),), 1)
    told = [() if c.next_token is None else (nan,) for c in batch.chunks]
    told += [()] * len(batch.forks)
    return super().launch(batch)._replace(prompts=told)


def test_a_prompt_without_finite_logits_ends_all_outputs() -> None:
  engine = make_engine(runner=_NoLogitsOfPrompt)
  engine.add(request('r', range(12), 4, n=3, prompt_logprobs=0))
  found = finish(engine)
  assert {i: d[-1].finish_reason for (_, i), d in found.items()} == (
    dict.fromkeys(range(3), types.FinishReason.ERROR)
  )
  assert engine.stats().num_free_pages == engine.stats().num_pages


def test_room_counts_slots_of_outputs() -> None:
  engine = make_engine(max_num_seqs=8)
  assert engine.room(0) == (8, 8)
  engine.add(request('r', range(6), 4, n=3))
  assert engine.room(0) == (5, 2)
  step(engine)
  assert engine.room(0) == (5, 8)


def test_who_waits_for_an_adapters_slot_leaves_room_up_to_a_number() -> None:
  """Else whoever comes would wait in the engine, where nothing bounds them."""
  engine = make_engine(max_num_seqs=4, max_loras=1)
  a, b = (types.Adapter(name, 0, {}) for name in 'ab')

  def add(name: str, adapter: types.Adapter) -> None:
    engine.add(dataclasses.replace(request(name, range(6), 9), adapter=adapter))

  add('r', a)
  step(engine)
  rooms = []
  for i in range(7):
    add(f'b{i}', b)
    rooms.append(engine.room(0)[0])
  assert rooms == [3, 3, 3, 3, 2, 1, 0]


def test_progress_is_told_of_each_output() -> None:
  engine = make_engine()
  engine.add(request('r', range(10), 4, n=3))
  assert [(r.index, r.is_running) for r in engine.requests()] == [
    (0, False),
    (1, False),
    (2, False),
  ]
  step(engine)
  step(engine)
  assert [
    (r.index, r.is_running, r.num_computed, r.num_output_tokens)
    for r in engine.requests()
  ] == [(i, True, 10, 1) for i in range(3)]


def test_more_than_can_run_is_refused() -> None:
  engine = make_engine(max_num_seqs=4)
  engine.check(request('r', [1], 4, n=4))
  with pytest.raises(errors.InvalidRequestError, match='max_num_seqs=4'):
    engine.check(request('r', [1], 4, n=5))
