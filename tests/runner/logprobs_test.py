# SPDX-License-Identifier: Apache-2.0
"""The log-probabilities of several tokens, against sorting in NumPy."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import pytest

from sarathi_jax.runner import logprobs
from sarathi_jax.runner import told
from tests import sampling_oracle

S = 24
INF = np.float32(np.inf)


def make_logits(rng: np.random.Generator, vocab_size: int) -> np.ndarray:
  """On a coarse grid, so that many are equal; some rule most tokens out."""
  logits = rng.integers(-9, 9, (S, vocab_size)).astype(np.float32) / 4
  logits[0] = 0.0
  logits[1, ::2] = -0.0
  few = rng.permutation(vocab_size)[:5]
  logits[2, np.setdiff1d(np.arange(vocab_size), few)] = -INF
  logits[3] *= 1e30
  return logits


def _fresh(tell: Any) -> Any:
  """Or JAX would remember what it traced before."""
  return functools.partial(tell)


@pytest.mark.parametrize('by_passes', [False, True], ids=['sorted', 'passes'])
@pytest.mark.parametrize('vocab_size', [20, 97, 128, 2561, 5000])
def test_what_is_told(
  monkeypatch: pytest.MonkeyPatch, vocab_size: int, by_passes: bool
) -> None:
  """Of equal tokens the lower id first, whichever way they are found."""
  if by_passes:
    monkeypatch.setattr(logprobs, '_largest', logprobs._largest_by_passes)
  rng = np.random.default_rng(vocab_size)
  logits = make_logits(rng, vocab_size)
  tokens = logits.argmax(-1).astype(np.int32)
  tokens[4:] = rng.integers(0, vocab_size, S - 4)
  named = rng.integers(0, vocab_size, (S, 7)).astype(np.int32)
  got: Any = jax.jit(_fresh(logprobs.tell))(logits, tokens, named)
  expected = sampling_oracle.log_softmax(logits.astype(np.float64))
  top = np.argsort(-logits, axis=-1, kind='stable')[:, : told.NUM_TOP]
  np.testing.assert_array_equal(got.top_ids, top)
  mine = logits[np.arange(S), tokens]
  np.testing.assert_array_equal(got.ranks, (logits >= mine[:, None]).sum(-1))
  for values, ids in (
    (got.top_logprobs, top),
    (got.named, named),
    (got.logprobs[:, None], tokens[:, None]),
  ):
    np.testing.assert_allclose(
      values, np.take_along_axis(expected, ids, 1), rtol=1e-5, atol=1e-5
    )


def test_fewer_tokens_than_are_told() -> None:
  """Ids beyond the vocabulary make up for them; who asks gets none of these."""
  logits = np.array([[0, 2, 1]], np.float32)
  got = jax.jit(logprobs.tell)(
    logits, np.zeros(1, np.int32), np.zeros((1, 0), np.int32)
  )
  assert got.top_ids[0, :3].tolist() == [1, 2, 0]
  assert (got.top_ids[0, 3:] >= 3).all()
