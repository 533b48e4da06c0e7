# SPDX-License-Identifier: Apache-2.0
"""Completions of an LLM inside a JAX program."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sarathi_jax import errors
from sarathi_jax import types
from tests import tiny
from tests.llm import common

MODEL = tiny.MODEL
GREEDY, PROMPTS = common.GREEDY, common.PROMPTS
tokens_of = common.tokens_of


def test_text_token_ids_lists_and_chats_are_prompts(llm):
  text, chat = 'The quick', [{'role': 'user', 'content': 'a fox'}]
  ids = llm.engine.tokenizer.encode(text)
  (one,) = llm.generate(text, GREEDY)
  assert one.prompt_token_ids == ids
  assert len(one.token_ids) == len(one.logprobs) == 6
  assert one.finish_reason is types.FinishReason.LENGTH
  assert one.text
  same = [ids, list(ids), np.array(ids), jnp.array(ids)]
  for prompt in same:
    assert llm.generate(prompt, GREEDY)[0].token_ids == one.token_ids
  assert tokens_of(llm.generate(same, GREEDY)) == [one.token_ids] * 4
  assert tokens_of(llm.generate(np.stack([ids, ids]), GREEDY)) == (
    [one.token_ids] * 2
  )
  (of_chat,) = llm.generate(chat, GREEDY)
  assert of_chat.prompt_token_ids == (
    llm.engine.tokenizer.apply_chat_template(chat)
  )
  mixed = llm.generate([text, list(ids), chat], GREEDY)
  assert tokens_of(mixed) == [one.token_ids, one.token_ids, of_chat.token_ids]
  assert llm.generate([]) == []


def test_logprobs_are_those_of_the_model(llm, params):
  sampling = types.SamplingParams(temperature=1.5, top_k=9, seed=1)
  model = jax.jit(common.all_logprobs)
  for prompt, done in zip(
    PROMPTS, llm.generate(PROMPTS, sampling), strict=True
  ):
    tokens = np.zeros(MODEL.context_len, np.int32)
    stop = len(prompt) + len(done.token_ids)
    tokens[:stop] = [*prompt, *done.token_ids]
    logprobs = np.asarray(model(params, tokens))
    at = np.arange(len(prompt), stop)
    np.testing.assert_allclose(
      done.logprobs, logprobs[at - 1, tokens[at]], atol=1e-4
    )


def test_each_prompt_may_have_its_own_sampling(llm, greedy):
  seeded = types.SamplingParams(temperature=2, seed=7, max_tokens=3)
  done = llm.generate(PROMPTS, [GREEDY, seeded, GREEDY])
  assert done[0].token_ids == greedy['old'][0]
  assert done[2].token_ids == greedy['old'][2]
  assert done[1].token_ids == llm.generate(PROMPTS[1], seeded)[0].token_ids
  assert len(done[1].token_ids) == 3
  with pytest.raises(
    errors.InvalidRequestError, match=r'sampling: 2 for 3 prompts'
  ):
    llm.generate(PROMPTS, [GREEDY, GREEDY])


def test_outputs_of_a_prompt_are_those_of_seeds_one_after_the_other(llm):
  several = types.SamplingParams(temperature=2, seed=7, n=3)
  alone = [types.SamplingParams(temperature=2, seed=seed) for seed in (7, 8, 9)]
  done = llm.generate(PROMPTS, several)
  assert [d.index for d in done] == [0, 1, 2] * 3
  assert tokens_of(done) == [
    completion.token_ids
    for prompt in PROMPTS
    for completion in llm.generate([prompt] * 3, alone)
  ]
  assert len(set(tokens_of(done))) == 9
  # Each prompt may have as many as it will.
  done = llm.generate(PROMPTS, [GREEDY, several, GREEDY])
  assert [d.request_id for d in done[1:4]] == [done[1].request_id] * 3
  assert len(done) == 5
  told: dict[int, list[int]] = {0: [], 1: [], 2: []}
  for delta in llm.stream(PROMPTS[1], several):
    told[delta.output_index] += delta.token_ids
  assert [tuple(told[i]) for i in range(3)] == tokens_of(done[1:4])


def test_all_outputs_end_when_a_stream_is_left(llm):
  several = types.SamplingParams(temperature=2, seed=7, n=3)
  stream = llm.stream(PROMPTS[1], several)
  next(stream)
  stream.close()
  stats = llm.engine.stats()
  assert (stats.num_running, stats.num_free_pages) == (0, stats.num_pages)


def test_one_greedy_output_is_all_there_is():
  with pytest.raises(
    errors.InvalidRequestError, match='n=2: must be 1 with temperature=0'
  ):
    types.SamplingParams(temperature=0, n=2)


@pytest.mark.parametrize(
  'sampling', [{'temperature': 0}, [{}], [None], 'x', 5, {GREEDY}]
)
def test_sampling_of_another_type_is_refused(llm, sampling):
  for use in (llm.generate, llm.stream):
    with pytest.raises(
      errors.InvalidRequestError, match=r'sampling=.*: must be SamplingParams'
    ):
      use([1], sampling)


def test_a_bad_prompt_of_several_is_named(llm):
  with pytest.raises(
    errors.InvalidRequestError,
    match=r'prompts\[2\]: prompt: has the unknown token id -5',
  ):
    llm.generate([[1], [2], [-5], [3]], GREEDY)
  with pytest.raises(errors.InvalidRequestError, match='prompt: is empty'):
    llm.generate([[]], GREEDY)


def test_it_can_be_used_again_and_again(llm, greedy):
  for _ in range(3):
    assert tokens_of(llm.generate(PROMPTS, GREEDY)) == greedy['old']


def test_a_bad_prompt_among_good_ones_starts_none(llm):
  before = llm.engine.metrics.num_steps
  for bad in ([], [10**6], [-1], list(range(64)), [1.5], np.array([1.5])):
    with pytest.raises(errors.InvalidRequestError):
      llm.generate([[1, 2], bad, [3]], GREEDY)
    assert not llm.engine.has_work
  assert llm.engine.metrics.num_steps == before


def test_inside_a_running_event_loop(llm, greedy):
  """As a notebook has it."""

  async def cell() -> list[types.Completion]:
    return llm.generate(PROMPTS, GREEDY)

  assert tokens_of(asyncio.run(cell())) == greedy['old']


def test_outside_of_the_main_thread(llm, greedy):
  got: list[types.Completion] = []
  thread = threading.Thread(
    target=lambda: got.extend(llm.generate(PROMPTS, GREEDY))
  )
  thread.start()
  thread.join()
  assert tokens_of(got) == greedy['old']


def test_a_notebooks_stop_button_leaves_it_in_order(llm, greedy, monkeypatch):
  """Pressed in the worst moment: a step is planned, but not launched."""
  launch = llm._runner.launch
  presses = iter([False, True])

  def press_and_launch(batch: types.ScheduledBatch) -> Any:
    if next(presses, False):
      os.kill(os.getpid(), signal.SIGINT)
    return launch(batch)

  monkeypatch.setattr(llm._runner, 'launch', press_and_launch)
  with pytest.raises(KeyboardInterrupt):
    llm.generate(PROMPTS, GREEDY)
  assert llm.engine.stats().num_free_pages == llm.engine.stats().num_pages
  assert tokens_of(llm.generate(PROMPTS, GREEDY)) == greedy['old']


def test_after_a_fault_it_says_so(make_llm, params, monkeypatch):
  llm = make_llm(params)

  def fail(pending: Any) -> Any:
    raise RuntimeError('RESOURCE_EXHAUSTED: out of memory')

  monkeypatch.setattr(llm._runner, 'fetch', fail)
  for _ in range(2):
    with pytest.raises(errors.EngineDeadError, match='out of memory') as caught:
      llm.generate(PROMPTS, GREEDY)
    assert isinstance(caught.value.__cause__, RuntimeError)
