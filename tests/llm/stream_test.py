# SPDX-License-Identifier: Apache-2.0
"""Completions of an LLM, token by token."""

from __future__ import annotations

import pytest

from sarathi_jax import errors
from sarathi_jax import types
from tests.llm import common

GREEDY, PROMPTS = common.GREEDY, common.PROMPTS
tokens_of = common.tokens_of


def test_a_stream_is_the_same_token_by_token(llm, greedy):
  deltas = list(llm.stream(PROMPTS[0], GREEDY))
  assert tuple(t for d in deltas for t in d.token_ids) == greedy['old'][0]
  assert [d.finish_reason for d in deltas[:-1]] == [None] * 5
  assert deltas[-1].finish_reason is types.FinishReason.LENGTH
  assert deltas[-1].metrics.num_output_tokens == 6


def test_a_bad_prompt_of_a_stream_is_told_at_once(llm):
  with pytest.raises(errors.InvalidRequestError):
    llm.stream([])


def test_leaving_a_stream_early_frees_its_pages(llm):
  stream = llm.stream(PROMPTS[2], GREEDY)
  next(stream)
  assert llm.engine.stats().num_free_pages < llm.engine.stats().num_pages
  stream.close()
  assert llm.engine.stats().num_free_pages == llm.engine.stats().num_pages
  assert llm.engine.metrics.num_aborted >= 1


def test_streams_take_turns(llm, greedy):
  """None loses what the steps of another brought."""
  sampling = types.SamplingParams(temperature=0, max_tokens=6)
  got: list[list[int]] = [[], [], []]
  streams = {i: llm.stream(p, sampling) for i, p in enumerate(PROMPTS)}
  done_between = None
  while streams:
    for i, stream in list(streams.items()):
      delta = next(stream, None)
      if delta is None:
        del streams[i]
      else:
        got[i].extend(delta.token_ids)
    if done_between is None:
      done_between = llm.generate(PROMPTS, GREEDY)
  assert [tuple(g) for g in got] == greedy['old']
  assert tokens_of(done_between) == greedy['old']


def test_leaving_one_stream_leaves_the_other(llm, greedy):
  left = llm.stream(PROMPTS[1], GREEDY)
  kept = llm.stream(PROMPTS[0], GREEDY)
  next(left)
  tokens = list(next(kept).token_ids)
  left.close()
  tokens += [t for d in kept for t in d.token_ids]
  assert tuple(tokens) == greedy['old'][0]


def test_what_is_left_as_python_ends_is_left_alone(llm, greedy):
  stream = llm.stream(PROMPTS[0], GREEDY)
  first = next(stream)
  stream.__del__(is_finalizing=lambda: True)
  rest = [token for delta in stream for token in delta.token_ids]
  assert (*first.token_ids, *rest) == greedy['old'][0]
