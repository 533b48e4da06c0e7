# SPDX-License-Identifier: Apache-2.0
"""What is told of a prompt: all of it, once, with the first token.

After t, token t + 1 + d has the log-probability -d; see FakeRunner.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from sarathi_jax import scheduler as scheduler_lib
from sarathi_jax import types
from sarathi_jax.engine import fake_runner
from tests.engine import harness

PROMPT = (3, 5, 6, 9, 9, 20, 21, 22, 23, 24, 26, 27, 28, 1, 2)
# Of each token of it but the first.
EXPECTED = [
  -float((after - before - 1) % harness.VOCAB_SIZE)
  for before, after in itertools.pairwise(PROMPT)
]


class Recording(fake_runner.FakeRunner):
  """Notes what is asked."""

  def __init__(self) -> None:
    super().__init__(harness.VOCAB_SIZE, 4)
    self.asked: list[tuple[int, int]] = []  # of chunks whose prompt is told

  def launch(self, batch: types.ScheduledBatch) -> types.Sampled:
    self.asked += [
      (chunk.start, chunk.num_tokens)
      for chunk in batch.chunks
      if chunk.next_token is not None
    ]
    return super().launch(batch)


def make(runner: Any, **fields: Any) -> Any:
  engine = harness.make_engine(runner=runner, token_budget=4, **fields)
  engine.add(harness.make_request('a', PROMPT, 3, prompt_logprobs=1))
  return engine


def check(deltas: list[types.OutputDelta]) -> None:
  first, *more = [delta for delta in deltas if delta.token_ids]
  assert first.prompt_logprobs is not None
  assert [at.logprob for at in first.prompt_logprobs] == EXPECTED
  assert [at.token_ids[0] for at in first.prompt_logprobs] == [*PROMPT[1:]]
  assert all(delta.prompt_logprobs is None for delta in more)


@pytest.mark.parametrize('look_ahead', [False, True])
@pytest.mark.parametrize('policy', scheduler_lib.POLICIES)
def test_a_prompt_is_told_once(policy: str, look_ahead: bool) -> None:
  engine = make(Recording(), policy=policy, look_ahead=look_ahead)
  check(harness.finish(engine)['a'])


@pytest.mark.parametrize('num_steps', range(1, 7))
def test_what_was_told_is_not_asked_for_again(num_steps: int) -> None:
  """When the cache is lost after so many steps, of which four are prefills."""
  runner = Recording()
  engine = make(runner)
  deltas = []
  for _ in range(num_steps):
    deltas += harness.step(engine)
  engine.invalidate_cache()
  check(harness.finish(engine, deltas)['a'])
  once = [(0, 4), (4, 4), (8, 4), (12, 3)]
  again = once[num_steps:] if num_steps < 4 else []
  assert runner.asked == once[:num_steps] + again


def test_a_part_is_asked_for_again_with_a_larger_chunk() -> None:
  """Then what is there already is not told twice."""
  runner = Recording()
  engine = make(runner, max_num_seqs=2)
  harness.step(engine)
  engine.invalidate_cache()
  engine.set_token_budget(3)
  check(harness.finish(engine)['a'])
  # The first is told, and the second in part.
  assert runner.asked == [(0, 4), (3, 3), (6, 3), (9, 3), (12, 3)]


class _NoLogits(fake_runner.FakeRunner):
  """Tells NaN of a prompt from its second chunk on."""

  def launch(self, batch: types.ScheduledBatch) -> types.Sampled:
    sampled = super().launch(batch)
    if sampled.prompts is None:
      return sampled
    return sampled._replace(
      prompts=[
        tuple(at._replace(logprobs=(float('nan'),)) for at in told)
        if chunk.start and told
        else told
        for chunk, told in zip(batch.chunks, sampled.prompts, strict=True)
      ]
    )


@pytest.mark.parametrize('look_ahead', [False, True])
def test_a_prompt_without_finite_logits_ends_alone(look_ahead: bool) -> None:
  engine = make(_NoLogits(harness.VOCAB_SIZE, 4), look_ahead=look_ahead)
  engine.add(harness.make_request('b', [1], 2))
  found = harness.finish(engine)
  (last,) = found['a']
  assert last.finish_reason is types.FinishReason.ERROR
  assert not last.token_ids and last.prompt_logprobs is None
  assert harness.tokens_of(found['b']) == [2, 3]


def test_a_stop_string_cuts_off_what_is_told() -> None:
  """As it does tokens; here a stop token, of several in one step."""

  class Several(fake_runner.FakeRunner):
    def launch(self, batch: types.ScheduledBatch) -> types.Sampled:
      at = types.TokenLogprobs((0,), (0.0,), 1)
      return types.Sampled([(7, 8, 9)], [(0.0, 0.0, 0.0)], [(at, at, at)])

  engine = harness.make_engine(runner=Several(harness.VOCAB_SIZE, 4))
  engine.add(harness.make_request('a', [1], 9, logprobs=0, stop_token_ids=[8]))
  (delta,) = harness.finish(engine)['a']
  assert delta.token_ids == (7, 8) and len(delta.told) == 2
