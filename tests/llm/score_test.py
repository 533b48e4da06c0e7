# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of completions that are given, as trainers need them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sarathi_jax
from sarathi_jax import errors
from sarathi_jax import types
from tests import tiny
from tests.llm import common

SAMPLING = types.SamplingParams(temperature=0.7, max_tokens=12, seed=5)
MAX_LEN = tiny.engine_config().max_model_len or tiny.MODEL.context_len


def trainers(
  params: Any, prompt: list[int], completion: Any, temperature: float = 1
) -> np.ndarray:
  """A full forward pass, as trainers have it."""
  tokens = jnp.asarray([*prompt, *completion], jnp.int32)
  logprobs = common.all_logprobs(params, tokens)
  logprobs = jax.nn.log_softmax(logprobs / jnp.float32(temperature))
  rows = jnp.arange(len(prompt), len(tokens), dtype=jnp.int32)
  return np.asarray(logprobs[rows - 1, tokens[rows]], np.float32)


def test_they_are_those_of_a_full_recompute(llm, params):
  prompts = [*common.PROMPTS, [9, 9], [3], list(range(MAX_LEN - 7))]
  completions = [
    *(c.token_ids for c in llm.generate(common.PROMPTS, SAMPLING)),
    [4],
    [],
    [1, 2, 3, 4, 5, 6, 7],  # as long as the model takes
  ]
  scores = llm.score(prompts, completions)
  assert [len(s) for s in scores] == [12, 12, 12, 1, 0, 7]
  assert {s.dtype for s in scores} == {np.dtype(np.float32)}
  expected = [
    trainers(params, *pair) for pair in zip(prompts, completions, strict=True)
  ]
  difference = sarathi_jax.compare_logprobs(scores, expected)
  assert difference.num_tokens == 44 and difference.most < 1e-4


def test_they_are_what_was_told_when_they_were_sampled(llm):
  done = llm.generate(common.PROMPTS, SAMPLING)
  scores = llm.score(common.PROMPTS, [jnp.asarray(c.token_ids) for c in done])
  assert sarathi_jax.compare_logprobs(
    (c.logprobs for c in done), scores
  ).most < (1e-4)
  # And not those of other tokens.
  others = [(*c.token_ids[1:], 0) for c in done]
  assert (
    sarathi_jax.compare_logprobs(
      (c.logprobs for c in done), llm.score(common.PROMPTS, others)
    ).most
    > 0.1
  )


@pytest.mark.parametrize('temperature', [0.7, 3])
def test_at_a_temperature_they_are_of_logits_divided_by_it(
  llm, params, temperature
):
  """Beside others, which are not; and as they were told when sampled."""
  sampling = dataclasses.replace(
    SAMPLING, temperature=temperature, logprobs_mode='temperature'
  )
  stream = llm.stream(list(range(40)), types.SamplingParams(prompt_logprobs=0))
  done = llm.generate(common.PROMPTS, sampling)
  completions = [c.token_ids for c in done]
  scores = llm.score(common.PROMPTS, completions, temperature)
  expected = [
    trainers(params, *pair, temperature)
    for pair in zip(common.PROMPTS, completions, strict=True)
  ]
  for ours in (scores, [c.logprobs for c in done]):
    assert sarathi_jax.compare_logprobs(ours, expected).most < 1e-4
  told = [t.logprobs[0] for d in stream for t in d.prompt_logprobs or ()]
  np.testing.assert_allclose(
    told, trainers(params, [0], range(1, 40)), atol=1e-4
  )


def test_a_temperature_of_0_divides_by_nothing(llm):
  zero, one = (llm.score([[1, 2]], [[3, 4]], t)[0] for t in (0, 1))
  assert zero.tolist() == one.tolist()
  with pytest.raises(errors.InvalidRequestError, match='temperature=-1'):
    llm.score([[1]], [[2]], -1)


def test_nothing_is_compiled(llm):
  with tiny.count_compiles() as compiled:
    llm.score(['t1 t2', [3, 4]], [[5, 6], [7]], 2.0)
  assert compiled == []


@pytest.mark.parametrize(
  ('completions', 'says'),
  [
    ([[1]], 'completions: 1 for 2 prompts'),
    ([[1], 't5'], r"completions\[1\]='t5': must be a list of token ids"),
    ([[1], [0.5]], r'completions\[1\]'),
    ([[1], [[2], [3, 4]]], r'completions\[1\]'),
    ([[1], [True]], r'completions\[1\]'),
    ([[1], [2, 10**6]], r'completions\[1\]: has the unknown token id 1000000'),
    ([[1], [1] * MAX_LEN], r'prompts\[1\]: '),
  ],
)
def test_what_can_not_be_scored_is_refused(llm, completions, says):
  with pytest.raises(errors.InvalidRequestError, match=says):
    llm.score([[1, 2], [3]], completions)


def test_16_bits_differ_by_what_is_told(make_llm, params):
  """Rounding alone: less than a tenth of what other weights make."""
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  llm = make_llm(params, dtype='bfloat16')
  done = llm.generate(common.PROMPTS, SAMPLING)
  expected = [
    trainers(params, prompt, c.token_ids)
    for prompt, c in zip(common.PROMPTS, done, strict=True)
  ]
  difference = sarathi_jax.compare_logprobs(
    llm.score(common.PROMPTS, [c.token_ids for c in done]), expected
  )
  assert 0 < difference.mean < 0.05


def test_a_difference_prints_as_a_line():
  difference = sarathi_jax.compare_logprobs(
    [[-1.0, -2.0], []], [[-1.0, -2.5], np.zeros(0)]
  )
  assert str(difference) == (
    '2 tokens: log-probabilities differ by 0.25 on average, 0.5 at most; '
    'importance ratio 0.803265 (0.606531 to 1.000000)'
  )
  with pytest.raises(ValueError, match=r'theirs\[0\]: has the shape \(2,\)'):
    sarathi_jax.compare_logprobs([[1.0]], [[1.0, 2.0]])
  with pytest.raises(ValueError, match='ours: has no tokens'):
    sarathi_jax.compare_logprobs([], [])
