# SPDX-License-Identifier: Apache-2.0
"""Adjusted logits against NumPy, over slots that are set up and counted in."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from sarathi_jax import sampling_params
from sarathi_jax import types
from sarathi_jax.runner import adjusting
from sarathi_jax.runner import batch as batch_lib
from sarathi_jax.runner import mesh as mesh_lib
from sarathi_jax.runner import sampling
from sarathi_jax.runner import sampling_rows
from sarathi_jax.runner import state as state_lib
from tests import sampling_oracle

P, V = 8, 23
EOS = (1,)
S = types.SamplingParams
_set_up = jax.jit(adjusting.set_up)
_count = jax.jit(adjusting.count)


@dataclasses.dataclass
class Case:
  """A request, somewhere in its output."""

  sampling: types.SamplingParams
  prompt: tuple[int, ...]
  output: tuple[int, ...]
  bad_words: tuple[tuple[int, ...], ...] = ()

  def chunk(self, slot: int, num_told: int) -> types.Chunk:
    """The first chunk in a slot, when some of the output is known."""
    ends = (*EOS, *self.sampling.stop_token_ids)
    return types.Chunk(
      request_id='',
      slot=slot,
      start=0,
      tokens=self.prompt,
      num_tokens=len(self.prompt),
      page_table=(),
      is_prefill=True,
      samples=1,
      prompt_len=len(self.prompt),
      seed=0,
      sampling=self.sampling,
      setup=types.SlotSetup(
        self.prompt + self.output[:num_told],
        ends if self.sampling.min_tokens else (),
        self.bad_words,
      ),
    )


def state_of(cases: Sequence[Case], num_told: Sequence[int]) -> Any:
  """The state once slots were set up, and the rest of outputs was sampled.

  Slots held something else before.
  """
  shapes = adjusting.shapes(P, V, mesh_lib.make())
  state = state_lib.init(shapes)  # type: ignore[arg-type]
  state = jax.tree.map(lambda leaf: leaf + 1, state)
  for slot, (case, num) in enumerate(zip(cases, num_told, strict=True)):
    for ints in adjusting.messages(case.chunk(slot, num)):
      state = _set_up(state, ints)
  left = [
    list(case.output[num:]) for case, num in zip(cases, num_told, strict=True)
  ]
  while any(left):  # in one batch, another row each time, and rows beside them
    slots = [*(i for i, rest in enumerate(left) if rest), 0, P + 3]
    sampled = [rest.pop(0) for rest in left if rest]
    n = len(slots)
    state = _count(
      state,
      *(
        np.pad(np.array(x), (0, P + 2 - n))
        for x in (
          np.array(slots, np.int32),
          np.arange(n) < n - 2,
          np.array([*sampled, 5, 5], np.int32),
        )
      ),
    )
  return state


def rows_of(cases: Sequence[Case]) -> dict[str, np.ndarray]:
  """What `sampling_rows` is given of each."""
  rows = [
    batch_lib._bits(
      [
        on_device.read(getattr(case.sampling, name))
        for name, (_, on_device) in batch_lib._SAMPLING.items()
      ]
    )
    for case in cases
  ]
  lens = [len(case.prompt) + len(case.output) for case in cases]
  seeds = [case.sampling.seed or 0 for case in cases]
  fields = batch_lib.sampling_of(np.array(rows).T.copy())
  del fields['is_masked']
  return {
    **fields,
    'slots': np.arange(len(cases), dtype=np.int32),
    'positions': np.array(lens, np.int32),
    'seeds': np.array(seeds, '<i8').view('<i4').reshape(-1, 2),
  }


@jax.jit
def _adjust(state: Any, logits: Any, rows: dict[str, Any]) -> Any:
  names = (
    'slots',
    'positions',
    'is_adjusted',
    'repetition_penalty',
    'presence_penalty',
    'frequency_penalty',
  )
  return adjusting.adjust(state, logits, *(rows[name] for name in names))


@jax.jit
def _filtered(adjusted: Any, rows: dict[str, Any]) -> Any:
  relative = adjusted - adjusted.max(axis=-1, keepdims=True)
  return sampling.filter_logits(
    relative / rows['temperature'][:, None],
    rows['top_k'],
    rows['top_p'],
    rows['min_p'],
  )


def random_case(rng: np.random.Generator) -> Case:
  """Each field is asked for in about half of the cases."""

  def ids(low: int, high: int) -> list[int]:
    return rng.integers(0, V, rng.integers(low, high)).tolist()

  def or_default(name: str, value: Any) -> dict[str, Any]:
    return {name: value} if rng.random() < 0.5 else {}

  output = tuple(ids(0, 25))
  words = [tuple(ids(1, 5)) for _ in range(rng.integers(1, 6))]
  if len(output) > 3:  # of which one is about to be completed
    words.append((*output[-rng.integers(1, 4) :], int(rng.integers(V))))
  fields = {
    **or_default('repetition_penalty', rng.choice([0.5, 1.3, 2.0])),
    **or_default('presence_penalty', rng.choice([-1.5, 0.25, 2.0])),
    **or_default('frequency_penalty', rng.choice([-0.5, 0.125, 1.0])),
    **or_default(
      'logit_bias',
      {t: float(rng.choice([-100, -1, 2.5, 7])) for t in ids(1, 9)},
    ),
    **or_default('bad_token_ids', ids(1, 4)),
    **or_default('min_tokens', int(rng.integers(30))),
    **or_default('stop_token_ids', ids(1, 3)),
    **or_default('temperature', float(rng.choice([0.3, 0.8, 1.7]))),
    **or_default('top_k', int(rng.integers(1, V + 2))),
    **or_default('top_p', float(rng.uniform(0.05, 1))),
    **or_default('min_p', float(rng.uniform(0, 0.5))),
  }
  if rng.random() < 0.3:
    fields['allowed_token_ids'] = [*ids(8, 20), 22]
  return Case(
    S(max_tokens=40, seed=int(rng.integers(-(2**63), 2**63 - 1)), **fields),
    tuple(ids(1, 40)),
    output,
    tuple(words) if rng.random() < 0.5 else (),
  )


def test_random_combinations_are_those_of_the_definition() -> None:
  """On a coarse grid, so that many are equal, and some are ruled out."""
  rng = np.random.default_rng(0)
  num_compared = num_filtered = 0
  for _ in range(400):
    cases = [random_case(rng) for _ in range(P)]
    logits = (rng.integers(-20, 21, (P, V)) / 4).astype(np.float32)
    logits[rng.random((P, V)) < 0.05] = -np.inf
    rows = rows_of(cases)
    told = [int(rng.integers(len(c.output) + 1)) for c in cases]
    got = np.asarray(_adjust(state_of(cases, told), logits, rows))
    kept = np.asarray(_filtered(got, rows)) > -np.inf
    for i, case in enumerate(cases):
      s = case.sampling
      want = sampling_oracle.adjust(
        logits[i], s, case.prompt, case.output, case.bad_words, EOS
      )
      if not (s.is_adjusted):
        want = logits[i].astype(np.float64)
      np.testing.assert_allclose(got[i], want, rtol=1e-6, atol=1e-6)
      num_compared += 1
      if np.isneginf(want).all():
        continue
      # The filters' ties are those of what the device divides.
      relative = got[i] - got[i].max()
      x, margin = sampling_oracle.filter_row(
        relative.astype(np.float64) / np.float32(s.temperature),
        s.top_k,
        s.top_p,
        s.min_p,
      )
      if margin > 1e-5:
        np.testing.assert_array_equal(kept[i], x > -np.inf)
        num_filtered += 1
  assert num_compared == 400 * P and num_filtered > 0.9 * num_compared


def case_of(**fields: Any) -> Case:
  return Case(S(max_tokens=None, **fields), (3, 3, 4), (5, 6, 5))


@pytest.mark.parametrize(
  'case,changed',
  [
    # Logits are 2, but -2 of token 4.
    (case_of(repetition_penalty=2.0), {3: 1, 4: -4, 5: 1, 6: 1}),
    (case_of(presence_penalty=0.5), {5: 1.5, 6: 1.5}),
    (case_of(frequency_penalty=0.5), {5: 1, 6: 1.5}),
    # Repetition first, then what is taken off; the bias before all.
    (
      case_of(
        logit_bias={5: 2.0, 9: 1.0},
        repetition_penalty=2.0,
        frequency_penalty=1.0,
        presence_penalty=0.25,
      ),
      {3: 1, 4: -4, 5: -0.25, 6: -0.25, 9: 3},
    ),
    (case_of(logit_bias={5: -1e300}), {5: -np.finfo(np.float32).max}),
    (case_of(logit_bias={5: 1e300}), {5: np.finfo(np.float32).max}),
    (case_of(repetition_penalty=1e-30), {3: 2e30, 4: -2e-30, 5: 2e30, 6: 2e30}),
    (case_of(bad_token_ids=[0, 5]), {0: -np.inf, 5: -np.inf}),
    (
      case_of(allowed_token_ids=[5, 6], logit_bias={6: 1.0, 7: 1.0}),
      {i: -np.inf for i in range(V) if i not in (5, 6)} | {6: 3},
    ),
    # Three tokens are there: a fourth is the least that may be followed by one.
    (
      case_of(min_tokens=4, stop_token_ids=[8]),
      {1: -np.inf, 8: -np.inf},
    ),
    (case_of(min_tokens=3, stop_token_ids=[8]), {}),
    *(
      (case_of(min_tokens=num), {1: -np.inf})
      for num in (2**31 - 4, 2**31 - 1, 2**31, 10**30)
    ),
  ],
)
@pytest.mark.parametrize('num_told', [0, 2, 3])
def test_by_hand(case: Case, changed: dict[int, float], num_told: int) -> None:
  logits = np.full((1, V), 2, np.float32)
  logits[0, 4] = -2
  expected = logits[0].copy()
  expected[list(changed)] = list(changed.values())
  got = _adjust(state_of([case], [num_told]), logits, rows_of([case]))
  np.testing.assert_allclose(got[0], expected, rtol=1e-6)


@pytest.mark.parametrize(
  'words,ruled_out',
  [
    ([(7,)], [7]),
    ([(5, 7)], [7]),
    ([(6, 5, 7), (6, 6, 8)], [7]),
    ([(5, 6, 5, 7)], [7]),
    ([(4, 5, 6, 5, 7)], []),  # The prompt does not count.
    ([(6, 7)], []),
    ([tuple(range(16))], []),
    ([(5, i) for i in range(20)], list(range(20))),
  ],
)
@pytest.mark.parametrize('num_told', [0, 1, 3])
def test_bad_words_by_hand(words: Any, ruled_out: Any, num_told: int) -> None:
  case = dataclasses.replace(case_of(bad_words=['x']), bad_words=tuple(words))
  got = _adjust(
    state_of([case], [num_told]), np.zeros((1, V), np.float32), rows_of([case])
  )
  assert np.flatnonzero(np.isneginf(got[0])).tolist() == ruled_out


def test_as_many_words_as_there_may_be_of_the_longest() -> None:
  most, length = (
    sampling_params.MAX_SPELLINGS,
    sampling_params.MAX_SPELLING_TOKENS,
  )
  output = tuple(i % V for i in range(40))
  words = [(2,) * length] * (most - 1) + [(*output[1 - length :], 7)]
  case = Case(S(bad_words=['x']), (1,), output, tuple(words))
  for num_told in (0, 30, 40):
    got = _adjust(
      state_of([case], [num_told]),
      np.zeros((1, V), np.float32),
      rows_of([case]),
    )
    assert np.flatnonzero(np.isneginf(got[0])).tolist() == [7]


def test_a_long_request_takes_several_messages() -> None:
  """And what they leave is what they say, whatever the slot held before."""
  vocab = 5000
  rng = np.random.default_rng(0)
  prompt = tuple(rng.permutation(vocab)[:3000].tolist())
  output = tuple(rng.integers(0, vocab, 900).tolist())
  bias = {int(i): float(i) for i in rng.permutation(vocab)[:2000]}
  case = Case(S(repetition_penalty=1.5, logit_bias=bias), prompt, output)
  told = list(adjusting.messages(case.chunk(1, len(output))))
  assert len(told) == 4
  shapes = adjusting.shapes(2, vocab, mesh_lib.make())
  state: Any = jax.tree.map(
    lambda leaf: leaf + 1,
    state_lib.init(shapes),  # type: ignore[arg-type]
  )
  for ints in told:
    state = _set_up(state, ints)
  counts = np.bincount(output, minlength=vocab)
  np.testing.assert_array_equal(state.tokens[1] >> 2, counts)
  np.testing.assert_array_equal(
    state.tokens[1] & 1, np.isin(np.arange(vocab), prompt)
  )
  expected = np.zeros(vocab, np.float32)
  expected[list(bias)] = list(bias.values())
  np.testing.assert_array_equal(state.biases[1], expected)
  assert (state.tokens[0] == 1).all() and (state.biases[0] == 1).all()


@jax.jit
def _sample(state: Any, logits: Any, rows: dict[str, Any]) -> Any:
  return sampling_rows._sample_rows(logits, state, **rows)[0]


def test_frequencies_are_those_of_the_distribution() -> None:
  """Chi-square, all features at once; deterministic, as the seed is."""
  n = 4096
  case = Case(
    S(
      max_tokens=None,
      temperature=0.8,
      top_k=9,
      top_p=0.97,
      min_p=0.01,
      repetition_penalty=1.2,
      presence_penalty=0.3,
      frequency_penalty=0.1,
      logit_bias={11: 1.0, 12: -1.0},
      bad_token_ids=[20],
      min_tokens=9,
      seed=2**40 + 3,
    ),
    (3, 3, 4),
    (17, 18, 17),
    ((17, 19),),
  )
  logits = np.linspace(-1, 2, V).astype(np.float32)
  rows = {
    name: np.repeat(row, n, axis=0) for name, row in rows_of([case]).items()
  }
  rows['positions'] = np.arange(n, dtype=np.int32)
  # Wherever they are, the end is ruled out: 1 has no chance without, either.
  output = _sample(state_of([case], [1]), np.tile(logits, (n, 1)), rows)
  adjusted = sampling_oracle.adjust(
    logits, case.sampling, case.prompt, case.output, case.bad_words, EOS
  )
  x, _ = sampling_oracle.filter_row(adjusted / 0.8, 9, 0.97, 0.01)
  expected = n * sampling_oracle.softmax(x)
  counts = np.bincount(output.tokens, minlength=V)
  assert counts[expected == 0].sum() == 0
  likely = expected > 0
  assert 5 <= likely.sum() <= 9
  chi_square = (
    (counts[likely] - expected[likely]) ** 2 / expected[likely]
  ).sum()
  # Between the 0.001- and the 0.9999-quantiles with 5 to 8 degrees of freedom.
  assert 0.2 < chi_square < 31.9
  np.testing.assert_allclose(
    output.logprobs,
    np.log(sampling_oracle.softmax(logits.astype(np.float64)))[output.tokens],
    rtol=1e-5,
  )


@pytest.mark.parametrize('temperature', [0.0, 1.0])
def test_rows_that_ask_for_nothing_do_not_notice(temperature: float) -> None:
  """Beside others that do, whatever their slots hold."""
  rng = np.random.default_rng(1)
  cases = [random_case(rng) for _ in range(P)]
  plain = [Case(S(temperature=temperature, seed=i), (1,), ()) for i in range(P)]
  mixed = [
    p if i % 2 else c for i, (p, c) in enumerate(zip(plain, cases, strict=True))
  ]
  state = state_of(cases, [0] * P)
  logits = rng.normal(0, 3, (P, V)).astype(np.float32)
  alone = _sample(state, logits, rows_of(plain))
  among = _sample(state, logits, rows_of(mixed))
  np.testing.assert_array_equal(among.tokens[1::2], alone.tokens[1::2])
  np.testing.assert_array_equal(among.logprobs[1::2], alone.logprobs[1::2])
  without, _ = sampling_rows._sample_rows(logits, None, **rows_of(plain))
  np.testing.assert_array_equal(without.tokens, alone.tokens)


@pytest.mark.parametrize('temperature', [0.0, 1.0])
def test_a_row_without_a_token_says_so(temperature: float) -> None:
  """Word by word, all that is allowed may be ruled out. Others go on."""
  stuck = Case(
    S(allowed_token_ids=[5], bad_words=['x'], temperature=temperature),
    (1,),
    (5,),
    ((5, 5),),
  )
  fine = Case(S(allowed_token_ids=[5], temperature=temperature), (1,), (5,))
  cases = [stuck, fine]
  output = _sample(
    state_of(cases, [1, 0]), np.zeros((2, V), np.float32), rows_of(cases)
  )
  np.testing.assert_array_equal(np.isnan(output.logprobs), [True, False])
  assert output.tokens[1] == 5 and 0 <= output.tokens[0] < V
