# SPDX-License-Identifier: Apache-2.0
"""What a model says of tokens that are given, and how far two engines differ.

A completion's last token is told of as one that could have been sampled, those
before it as tokens of the prompt: nothing is computed that is not asked for,
and a sequence may be as long as the model takes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from jaxtyping import Float
import numpy as np

from sarathi_jax import errors
from sarathi_jax import types
from sarathi_jax.engine import checks

Logprobs = Float[np.ndarray, ' T']


def listed(
  completions: Any, num_prompts: int, vocab_size: int
) -> list[list[int]]:
  """Returns the token ids of each completion.

  Args:
    completions: for each prompt a list or an array of token ids.
    num_prompts: how many there are to be.
    vocab_size: what the ids are to be below.

  Raises:
    InvalidRequestError: there are others, or they are something else.
  """
  arrays = [_array(one, i) for i, one in enumerate(completions)]
  if len(arrays) != num_prompts:
    raise errors.InvalidRequestError(
      f'completions: {len(arrays)} for {num_prompts} prompts; must be one each.'
    )
  given: list[list[int]] = [array.tolist() for array in arrays]
  for i, tokens in enumerate(given):
    checks.check_known(f'completions[{i}]', tokens, vocab_size)
  return given


def _array(completion: Any, index: int) -> np.ndarray:
  try:
    array = np.asarray(completion)
  except ValueError:  # It is ragged.
    array = np.empty((0, 0))
  if array.ndim != 1 or (array.size and array.dtype.kind not in 'iu'):
    raise errors.InvalidRequestError(
      f'completions[{index}]={errors.shown(completion)}: must be a list of '
      'token ids. (Which tokens a text is depends on what is before it.)'
    )
  return array


def asked(
  completion: Sequence[int], temperature: float = 1.0
) -> types.SamplingParams:
  """Returns what to ask for after a prompt and all but its last token.

  Args:
    completion: the token ids.
    temperature: that logits are divided by, if it is not 0.
  """
  return types.SamplingParams(
    temperature=0 if temperature == 1 else temperature,  # Draws nothing.
    logprobs_mode='temperature',
    seed=0,
    max_tokens=1,
    ignore_eos=True,
    prompt_logprobs=0 if len(completion) > 1 else None,
    logprob_token_ids=tuple(completion[-1:]) or None,
  )


def read(done: Iterator[types.Completion], num_tokens: int) -> Logprobs:
  """Returns the log-probabilities of the last tokens, and of the one after.

  Args:
    done: what was answered to `asked`; the next one is taken.
    num_tokens: of the completion. Of none nothing was asked.
  """
  return _of(next(done), num_tokens) if num_tokens else np.zeros(0, np.float32)


def _of(done: types.Completion, num_tokens: int) -> Logprobs:
  if done.finish_reason == types.FinishReason.ERROR:
    return np.full(num_tokens, np.nan, np.float32)
  before = (done.prompt_logprobs or ())[-(num_tokens - 1) :]
  (last,) = done.told
  return np.array(
    [*(told.logprobs[0] for told in before), last.logprobs[-1]], np.float32
  )


class LogprobDifference(NamedTuple):
  """How far log-probabilities of the same tokens are apart.

  Attributes:
    num_tokens: that were compared.
    mean, most: of the absolute differences, in nats.
    least_ratio, mean_ratio, most_ratio: of the importance ratios, a token's
      probability by the second divided by that by the first.
  """

  num_tokens: int
  mean: float
  most: float
  least_ratio: float
  mean_ratio: float
  most_ratio: float

  def __str__(self) -> str:
    return (
      f'{self.num_tokens:,} tokens: log-probabilities differ by '
      f'{self.mean:.2g} on average, {self.most:.2g} at most; importance ratio '
      f'{self.mean_ratio:.6f} ({self.least_ratio:.6f} to {self.most_ratio:.6f})'
    )


def compare_logprobs(
  ours: Iterable[Any], theirs: Iterable[Any]
) -> LogprobDifference:
  """Compares an engine's log-probabilities with a trainer's.

  Args:
    ours: for each completion, those of its tokens as they were sampled
      (`Completion.logprobs`, or of `LLM.score`).
    theirs: by what trains; of the same tokens.

  Returns:
    The differences, which print as a line.

  Raises:
    ValueError: they are not of the same tokens, or there are none.
  """
  pairs = [
    (np.asarray(a, np.float64), np.asarray(b, np.float64))
    for a, b in zip(ours, theirs, strict=True)
  ]
  for i, (a, b) in enumerate(pairs):
    if a.shape != b.shape:
      raise ValueError(
        f'theirs[{i}]: has the shape {b.shape}; must have that of ours, '
        f'{a.shape}.'
      )
  difference = np.concatenate(
    [np.zeros(0), *((b - a).ravel() for a, b in pairs)]
  )
  if not difference.size:
    raise ValueError('ours: has no tokens; there must be one to compare.')
  ratio = np.exp(difference)
  return LogprobDifference(
    difference.size,
    float(np.abs(difference).mean()),
    float(np.abs(difference).max()),
    float(ratio.min()),
    float(ratio.mean()),
    float(ratio.max()),
  )
