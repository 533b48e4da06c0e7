# SPDX-License-Identifier: Apache-2.0
"""Rows that are sampled under masks: what comes, and how often."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from sarathi_jax.runner import masking
from sarathi_jax.runner import sampling

V = 70
W = -(-V // 32)


def bits(allowed: Any) -> np.ndarray:
  """[rows, V] bool -> [rows, W] int32."""
  padded = np.zeros((len(allowed), W * 32), np.uint8)
  padded[:, :V] = allowed
  return np.packbits(padded, axis=1, bitorder='little').view(np.int32)


@jax.jit
def draw(logits: Any, masks: Any, seeds: Any) -> Any:
  n = len(logits)
  asked = dict(
    temperature=jnp.full(n, 1.25),
    top_k=jnp.zeros(n, jnp.int32),
    top_p=jnp.ones(n),
    min_p=jnp.zeros(n),
    seeds=seeds,
    positions=jnp.arange(n, dtype=jnp.int32),
  )
  return (
    sampling.sample(logits, **asked)[0],
    sampling.sample(logits, **asked, allowed=masks)[0],
  )


def make(n: int) -> tuple[np.ndarray, np.ndarray]:
  rng = np.random.default_rng(0)
  return (
    rng.normal(0, 2, (n, V)).astype(np.float32),
    rng.integers(-(2**31), 2**31, (n, 2)).astype(np.int32),
  )


def test_a_mask_of_everything_changes_nothing() -> None:
  logits, seeds = make(64)
  plain, masked = draw(logits, np.ones((64, V), bool), seeds)
  np.testing.assert_array_equal(plain.tokens, masked.tokens)
  np.testing.assert_array_equal(plain.logprobs, masked.logprobs)


def test_what_is_allowed_comes_as_often_as_it_should() -> None:
  n = 4096
  _, seeds = make(n)
  logits = np.tile(make(1)[0], (n, 1))
  allowed = np.random.default_rng(1).random(V) < 0.2
  _, masked = draw(logits, np.tile(allowed, (n, 1)), seeds)
  probs = np.where(allowed, np.exp(logits[0] / 1.25), 0)
  expected = n * probs / probs.sum()
  counts = np.bincount(masked.tokens, minlength=V)
  assert not counts[~allowed].any()
  often = expected > 5
  statistic = ((counts - expected)[often] ** 2 / expected[often]).sum()
  low, high = stats.chi2.ppf([0.001, 0.9999], often.sum() - 1)
  assert low < statistic < high
  # Of the logits as they came, whatever the mask.
  np.testing.assert_allclose(
    masked.logprobs,
    jax.nn.log_softmax(logits, axis=-1)[np.arange(n), masked.tokens],
    atol=1e-5,
  )


def test_a_row_that_allows_nothing_says_so() -> None:
  logits, seeds = make(2)
  _, masked = draw(logits, np.array([[False] * V, [True] * V]), seeds)
  assert np.isnan(masked.logprobs).tolist() == [True, False]


def test_masked_rows_are_kept_first() -> None:
  keep = jax.jit(masking.keep)
  logits = make(24)[0]
  kept = np.full((32, V), 7, np.float32)
  assert masking.sizes(32) == (4, 32)
  for rows in ([], [3], [0, 9, 23], [*range(24)], [*range(5, 20)]):
    is_masked = np.zeros(24, bool)
    is_masked[rows] = True
    found = np.asarray(keep(kept, logits, is_masked))
    np.testing.assert_array_equal(found[: len(rows)], logits[rows])
    if not rows:
      np.testing.assert_array_equal(found, kept)


def test_bits_are_tokens() -> None:
  from sarathi_jax.runner import sampling_rows

  allowed = np.random.default_rng(2).random((5, V)) < 0.5
  unpack = functools.partial(sampling_rows._allowed, vocab_size=V)
  np.testing.assert_array_equal(jax.jit(unpack)(bits(allowed)), allowed)
