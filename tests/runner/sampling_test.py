# SPDX-License-Identifier: Apache-2.0
"""Filters against their plain definition; draws against their distribution."""

from __future__ import annotations

import hypothesis
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
import jax
import numpy as np
import pytest

from pallas_kernels.filter_threshold import tuning
from sarathi_jax.runner import sampling
from tests import sampling_oracle

S, V = 8, 33

filter_logits = jax.jit(sampling.filter_logits)
sample = jax.jit(lambda *rows, **more: sampling.sample(*rows, **more)[0])


softmax = sampling_oracle.softmax


def may_be_sampled(
  logits: np.ndarray, top_k: int, top_p: float, min_p: float
) -> np.ndarray:
  """The definition, for one row. Skips examples where rounding decides."""
  x, margin = sampling_oracle.filter_row(
    logits.astype(np.float64), top_k, top_p, min_p
  )
  hypothesis.assume(margin > 1e-5)
  return x > -np.inf


# On a coarse grid, so that many are equal.
LOGITS = hnp.arrays(
  np.float32, (S, V), elements=st.integers(-20, 20).map(lambda i: i / 4)
)


def rows(elements):
  return hnp.arrays(np.float64, S, elements=elements).map(
    lambda x: x.astype(np.float32)
  )


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(
  logits=LOGITS,
  top_k=hnp.arrays(np.int32, S, elements=st.integers(0, V + 3)),
  top_p=rows(st.just(1.0) | st.floats(0.01, 1)),
  min_p=rows(st.just(0.0) | st.just(1.0) | st.floats(0.001, 1)),
)
def test_filters_are_what_they_are_defined_to_be(logits, top_k, top_p, min_p):
  logits -= logits.max(axis=-1, keepdims=True)
  got = np.asarray(filter_logits(logits, top_k, top_p, min_p))
  for row in range(S):
    kept = may_be_sampled(
      logits[row], top_k[row], float(top_p[row]), float(min_p[row])
    )
    np.testing.assert_array_equal(got[row] > -np.inf, kept, f'{row=}')
    np.testing.assert_array_equal(got[row][kept], logits[row][kept])


def one_row(values, top_k=0, top_p=1.0, min_p=0.0) -> list[int]:
  logits = np.full((S, V), -30, np.float32)
  logits[0, : len(values)] = values

  def fill(x, dtype):
    return np.full(S, x, dtype)

  got = filter_logits(
    logits - logits.max(axis=-1, keepdims=True),
    fill(top_k, np.int32),
    fill(top_p, np.float32),
    fill(min_p, np.float32),
  )
  return np.flatnonzero(np.asarray(got[0]) > -np.inf).tolist()


@pytest.mark.parametrize(
  'fields,kept',
  [
    (dict(top_k=1), [1]),
    (dict(top_k=2), [0, 1, 3]),  # A tie for the second place.
    (dict(top_k=V + 9), list(range(V))),
    (dict(top_p=1e-30), [1]),
    (dict(top_p=0.0), [1]),  # A top_p that float32 has no room for.
    (dict(top_p=0.5), [1]),
    (dict(top_p=0.7), [0, 1, 3]),
    (dict(min_p=1.0), [1]),
    (dict(min_p=np.exp(-1.01)), [0, 1, 3]),
    # min_p first: of what it leaves, the likeliest is more than top_p.
    (dict(min_p=0.9, top_p=0.99), [1]),
    # top_k first: of what it leaves, three make up top_p.
    (dict(top_k=3, top_p=0.98), [0, 1, 3]),
  ],
)
def test_filters_by_hand(fields, kept):
  assert one_row([1, 2, -1, 1, 0], **fields) == kept


def test_minus_zero_is_zero():
  assert one_row([-0.0, 0.0, -1], top_k=1) == [0, 1]


def words(seeds) -> np.ndarray:
  """[S, 2] as `BatchArrays.seeds` has them, taken apart by arithmetic."""
  parts = [(seed % 2**32, seed // 2**32 % 2**32) for seed in map(int, seeds)]
  return np.array(parts, np.uint32).astype(np.int32)


@pytest.fixture(scope='module')
def batch() -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  return dict(
    logits=rng.normal(0, 3, (S, V)).astype(np.float32),
    temperature=np.array([1, 0, 0.7, 2, 0, 1, 1, 1e-30], np.float32),
    top_k=np.array([0, 0, 5, 0, 3, 0, 9, 0], np.int32),
    top_p=np.array([1, 1, 1, 0.9, 0.5, 1, 0.8, 1], np.float32),
    min_p=np.array([0, 0, 0, 0, 0, 0.1, 0.05, 0], np.float32),
    seeds=words([1, 2, 3, 4, 5, 1, 2**63 - 1, 0]),
    positions=np.array([1, 7, 7, 9, 40, 1, 3, 100], np.int32),
  )


def test_greedy_rows_are_the_likeliest_whatever_the_others_are(batch):
  tokens, _ = sample(**batch)
  likeliest = batch['logits'].argmax(axis=-1)
  greedy = batch['temperature'] < 1e-9  # So low is as good as 0.
  np.testing.assert_array_equal(tokens[greedy], likeliest[greedy])
  alone, _ = sample(**{**batch, 'temperature': np.zeros(S, np.float32)})
  np.testing.assert_array_equal(alone, likeliest)


def test_logprobs_are_of_the_logits_as_they_came(batch):
  tokens, logprobs = sample(**batch)
  expected = np.log(softmax(batch['logits'].astype(np.float64)))
  np.testing.assert_allclose(
    logprobs, expected[np.arange(S), tokens], rtol=1e-5
  )
  assert tokens.dtype == np.int32 and logprobs.dtype == np.float32


@pytest.mark.parametrize(
  'chosen',
  [np.random.default_rng(1).permutation(S), np.array([6, 2, 0])],
  ids=['permuted', 'fewer'],
)
def test_a_row_does_not_depend_on_its_batch(batch, chosen):
  tokens, logprobs = sample(**batch)
  got, got_logprobs = sample(**{k: v[chosen] for k, v in batch.items()})
  np.testing.assert_array_equal(got, tokens[chosen])
  np.testing.assert_allclose(got_logprobs, logprobs[chosen], rtol=1e-6)


def test_a_row_does_not_depend_on_the_programs_default_generator(batch):
  """Of JAX's generators, rbg makes other numbers in other batches."""
  expected, _ = sample(**batch)
  with jax.default_prng_impl('rbg'):
    got, _ = jax.jit(lambda b: sampling.sample(**b)[0])(batch)
  np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(
  'vocab_size', [pytest.param(33, marks=pytest.mark.slow), 700]
)
def test_a_gpus_kernel_gives_the_same_tokens(vocab_size, monkeypatch):
  """Of all filters at once, and of rows that are not sane; interpreted."""
  rng = np.random.default_rng(3)
  num = 3000
  logits = rng.normal(0, 4, (num, vocab_size)).astype(np.float32)
  logits[: num // 2] = logits[: num // 2].round(1)
  logits[::7, ::2] = -np.inf
  for row, bad in enumerate((np.nan, np.inf, -np.inf)):
    logits[row, row] = bad
  logits[3] = -np.inf
  rows = dict(
    logits=logits,
    temperature=rng.choice([0, 0.3, 1, 5], num).astype(np.float32),
    top_k=rng.choice([0, 1, 5, vocab_size // 2], num).astype(np.int32),
    top_p=rng.choice([1, 1e-6, 0.3, 0.95], num).astype(np.float32),
    min_p=rng.choice([0, 0, 0.1], num).astype(np.float32),
    seeds=words(range(num)),
    positions=np.arange(num, dtype=np.int32),
  )
  expected = sample(**rows)
  monkeypatch.setattr(tuning, 'fastest', lambda: 'pallas_triton')
  with_kernel = jax.jit(lambda **rows: sampling.sample(**rows)[0]).trace(**rows)
  assert 'name=least_kept' in str(with_kernel.jaxpr)
  got = with_kernel.lower().compile()(**rows)
  np.testing.assert_array_equal(got.tokens, expected.tokens)
  np.testing.assert_array_equal(got.logprobs, expected.logprobs)


N, FEW = 4096, 12
VARIED = {
  'positions': dict(positions=np.arange(N, dtype=np.int32)),
  'seeds': dict(seeds=words(range(N))),
  'high halves': dict(seeds=words(i << 32 for i in range(N))),
  'negative seeds': dict(seeds=words(range(-N, 0))),
}
LOGITS_OF_FEW = np.linspace(-1, 1.5, FEW).astype(np.float32)


@pytest.mark.parametrize('top_k', [0, 5])
@pytest.mark.parametrize('varied', VARIED)
def test_frequencies_are_those_of_the_distribution(varied, top_k):
  """Chi-square; deterministic, as the seeds are."""
  columns = dict(
    temperature=np.full(N, 0.8, np.float32),
    top_k=np.full(N, top_k, np.int32),
    top_p=np.ones(N, np.float32),
    min_p=np.zeros(N, np.float32),
    seeds=words([5] * N),
    positions=np.full(N, 7, np.int32),
  )
  columns.update(VARIED[varied])
  tokens, _ = sample(np.tile(LOGITS_OF_FEW, (N, 1)), **columns)
  counts = np.bincount(tokens, minlength=FEW)
  num_kept = top_k or FEW
  expected = N * softmax(LOGITS_OF_FEW[-num_kept:].astype(np.float64) / 0.8)
  assert counts[:-num_kept].sum() == 0
  chi_square = ((counts[-num_kept:] - expected) ** 2 / expected).sum()
  # The 0.9999-quantiles of chi-square with 11 and 4 degrees of freedom.
  assert chi_square < {FEW: 37.4, 5: 23.5}[num_kept]
  # And 0.001-quantiles: it isn't too even to be random, either.
  assert chi_square > {FEW: 1.58, 5: 0.09}[num_kept]


def test_neighbouring_tokens_are_independent():
  """Of a request, and of requests with neighbouring seeds."""
  side = 64
  seeds, positions = np.divmod(np.arange(side * side, dtype=np.int32), side)
  tokens, _ = sample(
    np.zeros((N, FEW), np.float32),
    np.ones(N, np.float32),
    np.zeros(N, np.int32),
    np.ones(N, np.float32),
    np.zeros(N, np.float32),
    words(seeds),
    positions,
  )
  grid = np.asarray(tokens).reshape(side, side)
  for a, b in ((grid[1:], grid[:-1]), (grid[:, 1:], grid[:, :-1])):
    assert abs((a == b).mean() - 1 / FEW) < 0.018  # Four deviations.


def tokens_of(seeds) -> np.ndarray:
  """[seeds, V] what each draws from even odds at V places."""
  n = len(seeds)
  rows = dict(
    logits=np.zeros((n * V, V), np.float32),
    temperature=np.ones(n * V),
    top_k=np.zeros(n * V, np.int32),
    top_p=np.ones(n * V),
    min_p=np.zeros(n * V),
    seeds=np.repeat(words(seeds), V, axis=0),
    positions=np.tile(np.arange(V, dtype=np.int32), n),
  )
  return np.asarray(sample(**rows)[0]).reshape(n, V)


def test_seeds_of_64_bits_that_differ_in_one_give_other_tokens():
  seeds = [5, *(5 ^ 1 << bit for bit in range(63)), 5 - 2**63]
  streams = tokens_of(seeds)
  assert len(np.unique(streams, axis=0)) == len(seeds) == 65
  # And no more of them alike than those of different requests are.
  assert abs((streams[1:] == streams[0]).mean() - 1 / V) < 0.02


@pytest.mark.parametrize('seed', [0, 1, 12345, 2**31 - 1])
def test_seeds_of_31_bits_give_what_they_always_gave(seed):
  key = jax.random.fold_in(jax.random.key(0, impl='threefry2x32'), seed)
  noise = jax.vmap(
    lambda position: jax.random.gumbel(
      jax.random.fold_in(key, position), (V,), np.float32
    )
  )(np.arange(V))
  np.testing.assert_array_equal(
    tokens_of([seed])[0], np.asarray(noise).argmax(axis=-1)
  )


@pytest.mark.parametrize('temperature', [0, 1])
@pytest.mark.parametrize(
  'bad',
  [
    {3: np.nan},
    {V - 1: np.inf},
    dict.fromkeys(range(V), -np.inf),
    dict.fromkeys(range(V), np.nan),
    {0: np.inf, 1: -np.inf},
  ],
  ids=['a NaN', 'an infinity', 'no token', 'all NaN', 'both'],
)
def test_a_row_without_a_largest_finite_logit_says_so(batch, bad, temperature):
  """And the others don't notice."""
  fine = {**batch, 'temperature': np.full(S, temperature, np.float32)}
  logits = fine['logits'].copy()
  logits[2, list(bad)] = list(bad.values())
  logits[4, 5:] = -np.inf  # Some tokens can't be; others can.
  expected, _ = sample(
    **{**fine, 'logits': np.where(np.arange(S)[:, None] == 2, 0, logits)}
  )
  tokens, logprobs = sample(**{**fine, 'logits': logits})
  np.testing.assert_array_equal(np.isnan(logprobs), np.arange(S) == 2)
  assert np.isfinite(np.delete(logprobs, 2)).all()
  np.testing.assert_array_equal(np.delete(tokens, 2), np.delete(expected, 2))
  assert 0 <= tokens[2] < V  # The next step looks it up, to no end.


def test_log_probabilities_are_finite_if_the_logits_are(batch):
  logits = np.full((S, V), 3e38, np.float32)
  logits[:, 1:] = -3e38
  _, logprobs = sample(
    **{
      **batch,
      'logits': logits,
      'temperature': np.full(S, 3e38, np.float32),
      'top_k': np.zeros(S, np.int32),
    }
  )
  assert np.isfinite(logprobs).all()
