# SPDX-License-Identifier: Apache-2.0
"""`SamplingParams` as vLLM documents them: what they do to logits, in NumPy."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from sarathi_jax import types

BadWords = Sequence[Sequence[int]]


def softmax(x: np.ndarray) -> np.ndarray:
  exp = np.exp(x - x.max(axis=-1, keepdims=True))
  return exp / exp.sum(axis=-1, keepdims=True)


def log_softmax(logits: np.ndarray) -> np.ndarray:
  x = logits - logits.max(axis=-1, keepdims=True)
  with np.errstate(divide='ignore'):
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def adjust(
  logits: np.ndarray,
  sampling: types.SamplingParams,
  prompt: Sequence[int],
  output: Sequence[int],
  bad_words: BadWords = (),
  eos_token_ids: Collection[int] = (),
) -> np.ndarray:
  """Returns the logits of the token after `output`, adjusted, in float64.

  Args:
    logits: [V] as they came.
    sampling: of the request.
    prompt, output: its tokens.
    bad_words: the token ids of each.
    eos_token_ids: of the model.
  """
  x = logits.astype(np.float64)
  never = np.isneginf(x)
  if sampling.allowed_token_ids is not None:
    is_allowed = np.zeros(len(x), bool)
    is_allowed[list(sampling.allowed_token_ids)] = True
    never |= ~is_allowed
  never[list(sampling.bad_token_ids)] = True
  for word in bad_words:
    begin = list(word[:-1])
    if begin == list(output[len(output) - len(begin) :]):
      never[word[-1]] = True
  if len(output) < sampling.min_tokens:
    never[[*eos_token_ids, *sampling.stop_token_ids]] = True
  for token, bias in (sampling.logit_bias or {}).items():
    x[token] += bias
  for token in {*prompt, *output}:
    penalty = sampling.repetition_penalty
    x[token] = x[token] / penalty if x[token] > 0 else x[token] * penalty
  for token in output:
    x[token] -= sampling.frequency_penalty
  for token in set(output):
    x[token] -= sampling.presence_penalty
  return np.where(never, -np.inf, x)


def filter_row(
  logits: np.ndarray, top_k: int, top_p: float, min_p: float
) -> tuple[np.ndarray, float]:
  """Keeps what a row's filters keep, by sorting; ties all stay.

  Args:
    logits: [V] float64, divided by the temperature.
    top_k, top_p, min_p: see `SamplingParams`.

  Returns:
    The logits, minus infinity where a token is dropped, and by how little the
    nearest decision was made, as a probability.
  """
  x, margin = logits, 1.0
  if min_p > 0:
    relative = softmax(x) / softmax(x).max()
    if min_p < 1:
      margin = min(margin, abs(relative - min_p).min())
    x = np.where(relative >= min_p, x, -np.inf)
  if 0 < top_k < len(x):
    x = np.where(x >= np.sort(x)[-top_k], x, -np.inf)
  if top_p < 1:
    descending = np.sort(x)[::-1]
    totals = np.cumsum(softmax(descending))
    margin = min(margin, abs(totals - top_p).min())
    x = np.where(x >= descending[np.argmax(totals >= top_p)], x, -np.inf)
  return x, margin
