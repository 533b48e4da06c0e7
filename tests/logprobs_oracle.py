# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities as `SamplingParams` says what they are, in NumPy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import functools
import itertools
from typing import Any

import jax
import numpy as np

from sarathi_jax import models
from sarathi_jax import types
from sarathi_jax.models import config as model_config_lib
from tests import naive
from tests import sampling_oracle

LogitsOf = Callable[[Sequence[int]], np.ndarray]


@functools.partial(jax.jit, static_argnums=0)
def _logits(
  model: model_config_lib.ModelConfig, params: Any, tokens: Any
) -> jax.Array:
  return models.unembed(model, params, naive.hidden_of(model, params, tokens))


def logits_of(model: model_config_lib.ModelConfig, params: Any) -> LogitsOf:
  """Returns what computes the logits after each of some tokens, [n, V]."""
  max_len = model.max_position_embeddings

  def of(tokens):
    padded = np.zeros(max_len, np.int32)
    padded[: len(tokens)] = tokens
    return np.asarray(_logits(model, params, padded))[: len(tokens)].astype(
      np.float64
    )

  return of


def processed(
  logits: np.ndarray,
  sampling: types.SamplingParams,
  prompt: Sequence[int],
  output: Sequence[int],
  bad_words: sampling_oracle.BadWords = (),
) -> tuple[np.ndarray, float]:
  """Returns [V] what log-probabilities are of, and `filter_row`'s margin."""
  if sampling.logprobs_mode == 'raw':
    return logits, 1.0
  if sampling.logprobs_mode == 'temperature':
    return logits / (sampling.temperature or 1), 1.0
  x = sampling_oracle.adjust(logits, sampling, prompt, output, bad_words)
  if not sampling.temperature:
    return x, 1.0
  return sampling_oracle.filter_row(
    x / sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p
  )


def check(
  done: types.Completion,
  sampling: types.SamplingParams,
  logits_of: LogitsOf,
  atol: float = 1e-4,
) -> None:
  """Holds all log-probabilities of a completion to what is asked for.

  Args:
    done: the completion.
    sampling: its request's.
    logits_of: computes the logits after each token, [n, V].
    atol: of log-probabilities; of likeliest tokens, too.
  """
  prompt, output = done.prompt_token_ids, done.token_ids
  tokens = [*prompt, *output]
  logits = logits_of(tokens[:-1])
  if sampling.prompt_logprobs is None:
    assert done.prompt_logprobs is None
  else:
    assert done.prompt_logprobs is not None
    assert len(done.prompt_logprobs) == len(prompt) - 1
    is_divided = sampling.logprobs_mode == 'temperature'
    by = sampling.temperature if is_divided else 0
    for i, told in enumerate(done.prompt_logprobs):
      check_one(
        told,
        prompt[i + 1],
        logits[i] / (by or 1),
        sampling.prompt_logprobs,
        (),
        atol,
      )
  assert len(done.told) == (len(output) if sampling.tells else 0)
  bad_words = [
    [int(token[1:]) for token in word.split()] for word in sampling.bad_words
  ]
  for i, token in enumerate(output):
    x, margin = processed(
      logits[len(prompt) - 1 + i], sampling, prompt, output[:i], bad_words
    )
    if margin < 1e-5:  # Rounding decides what is filtered.
      continue
    assert abs(done.logprobs[i] - sampling_oracle.log_softmax(x)[token]) < atol
    if sampling.tells:
      assert done.told[i].logprob == done.logprobs[i]
      check_one(
        done.told[i],
        token,
        x,
        sampling.logprobs or 0,
        sampling.logprob_token_ids or (),
        atol,
      )


def check_one(
  told: types.TokenLogprobs,
  token: int,
  logits: np.ndarray,
  num_top: int,
  named: tuple[int, ...],
  atol: float,
) -> None:
  """Holds what is told at one position to the logits there, [V]."""
  expected = sampling_oracle.log_softmax(logits)
  ids = told.token_ids
  assert ids[0] == token and ids[1 + num_top :] == named
  got = np.array(told.logprobs)
  finite = np.isfinite(expected[list(ids)])
  np.testing.assert_array_equal(np.isfinite(got), finite)
  np.testing.assert_allclose(
    got[finite], expected[list(ids)][finite], atol=atol, rtol=0
  )
  top = ids[1 : 1 + num_top]
  assert len(set(top)) == num_top
  assert all(a >= b for a, b in itertools.pairwise(told.logprobs[1:num_top]))
  # But for rounding, none that is left out is likelier.
  rest = np.delete(expected, top)
  if num_top and rest.size:
    assert rest.max() <= told.logprobs[num_top] + atol
  least = (expected > expected[token] + atol).sum() + 1
  most = (expected > expected[token] - atol).sum()
  assert least <= told.rank <= most


def requests(
  vocab_size: int, prompt_lens: Sequence[int]
) -> list[types.Request]:
  """Requests for all sorts of log-probabilities, beside some for none."""
  rng = np.random.default_rng(3)
  asked: list[dict[str, Any]] = [
    dict(logprobs=20, prompt_logprobs=20),
    dict(),
    dict(logprobs=3, logprobs_mode='processed'),
    dict(prompt_logprobs=0, logprob_token_ids=(5, vocab_size - 1, 5)),
    dict(logprobs=0, logprobs_mode='temperature', prompt_logprobs=2),
    dict(logprobs_mode='processed', logprob_token_ids=tuple(range(40))),
    dict(logprobs_mode='temperature'),
  ]
  how: list[dict[str, Any]] = [
    dict(temperature=0),
    dict(temperature=0.8, top_k=9, top_p=0.95, seed=1),
    dict(temperature=1.4, min_p=0.02, repetition_penalty=1.3, seed=2),
    dict(
      temperature=0, frequency_penalty=0.7, logit_bias={3: 2.5}, min_tokens=2
    ),
    {
      name: getattr(naive.ADJUSTED[2], name)
      for name in ('allowed_token_ids', 'bad_token_ids', 'top_k', 'seed')
    },
  ]
  return [
    types.Request(
      request_id=f'{n}-{i}',
      prompt_token_ids=tuple(rng.integers(0, vocab_size, n).tolist()),
      sampling=types.SamplingParams(
        max_tokens=20, **(asked[(3 * j + i) % 7] | how[(j + 2 * i) % 5])
      ),
    )
    for j, n in enumerate(prompt_lens)
    for i in range(2)
  ]
