# SPDX-License-Identifier: Apache-2.0
"""What a grammar may cost, of memory and of the processor's time."""

from __future__ import annotations

import pathlib
import random
import resource
import time
from typing import Any

import pytest

from sarathi_jax import errors
from sarathi_jax import types
from sarathi_jax.grammar import compiler
from sarathi_jax.grammar import matcher as matcher_lib
from tests.grammar import walks

Params = types.StructuredOutputsParams
# Where each token can be of many parts, the more the longer the output is.
_AMBIGUOUS = Params(grammar='start: s\ns: s s | "a" | "b"')


def _grammars() -> compiler.Grammars:
  """Grammars of which none is known yet."""
  _, vocab_size, eos = walks.VOCABULARIES['bytes']
  found = compiler.Grammars(walks.grammars()._tokenizer, vocab_size, eos)
  found.warm_up()
  return found


def _resident() -> int:
  pages = int(pathlib.Path('/proc/self/statm').read_text().split()[1])
  return pages * resource.getpagesize()


def test_short_regular_expressions_take_little_memory() -> None:
  """Each took 165 MB, for as long as it was kept, and 0.7 s."""
  of = _grammars()
  many = [f'({letter}{{1000}}){{1000}}' for letter in 'abcd']
  before = _resident(), time.thread_time()
  for regex in many:
    of.compile(Params(regex=regex))
    of.compile(Params(json={'type': 'string', 'pattern': f'^{regex}$'}))
    of.compile(Params(grammar=f'start: /{regex}/'))
  assert _resident() - before[0] < 100 << 20
  assert time.thread_time() - before[1] < 2


@pytest.mark.parametrize(
  'said',
  [
    {'json': {'const': 'x' * 32_000}},
    {'json': {'anyOf': [{'const': c * 16_000} for c in 'xy']}},
    {'regex': '(x{100}){320}'},
    {'choice': ['x' * 32_000, 'y']},
    {'grammar': f'start: "{"x" * 32_000}"'},
    {'grammar': '%llguidance {"no_forcing": false}\nstart: /x{32000}/'},
    {'structural_tag': {'format': {'type': 'const_string',
                                   'value': 'x' * 32_000}}},
  ],
)  # fmt: skip
def test_a_mask_takes_no_longer_for_a_long_text(said: dict[str, Any]) -> None:
  """Each of 100 outputs took 5 ms, in each step."""
  of = _grammars()
  matchers = of.compile(Params(**said)).matchers(types.SamplingParams(n=100))
  masks = of.masks(matchers)
  began = time.thread_time()
  for _ in range(3):
    token = walks.allowed(masks[0], 320)[0]
    for matcher in matchers:
      matcher.consume([token])
    masks = of.masks(matchers)
  assert time.thread_time() - began < 0.3
  assert not any(matcher.fault for matcher in matchers)


def test_the_time_of_masks_is_bounded_for_a_request_as_a_whole(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  """A grammar of 30 characters comes to 0.1 s a mask."""
  monkeypatch.setattr(matcher_lib, '_AT_ONCE_S', 0.02)
  monkeypatch.setattr(matcher_lib, '_EACH_S', 0.0005)
  of = _grammars()
  grammar = of.compile(_AMBIGUOUS)
  matchers = grammar.matchers(types.SamplingParams(n=4))
  other = grammar.matchers(types.SamplingParams())[0]
  a = of._tokenizer.token_id('a')
  assert a is not None
  while not matchers[0].is_over:
    assert not matchers[0].fault and matchers[0].num_consumed < 500
    of.masks(matchers)
    for matcher in matchers:
      matcher.consume([a])
  for matcher in matchers:
    assert matcher.is_over and matcher.fault == matcher_lib._SLOW
  assert not other.is_over and not other.fault


def test_an_allowance_is_of_usual_masks_and_some_slow_ones() -> None:
  allowance = matcher_lib.Allowance()
  for _ in range(1000):
    allowance.take(0.9 * matcher_lib._EACH_S)
  allowance.take(0.9 * matcher_lib._AT_ONCE_S)  # None is saved up beyond this.
  assert not allowance.is_spent
  allowance.take(0.2 * matcher_lib._AT_ONCE_S)
  assert allowance.is_spent


def test_as_much_is_kept_as_it_cost_to_compile(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  regexes = [Params(regex=f'a{{{i + 1}}}') for i in range(5)]
  for name, bound, num in (
    ('_KEPT', 3, 3),
    ('_KEPT_CHARS', 10, 2),
    ('_KEPT_S', 1e-9, 1),
  ):
    of = _grammars()
    with monkeypatch.context() as patch:
      patch.setattr(compiler, name, bound)
      found = [of.compile(regex) for regex in regexes]
      assert len(of._kept) == num
      assert of.compile(regexes[-1]) is found[-1]
      assert of.compile(regexes[0]) is not found[0]


@pytest.mark.parametrize(
  'said',
  [
    {'regex': '(' * 20_000 + 'a' + ')' * 20_000},
    {'regex': '|'.join(f'(x{i}|y)+[a-z]{{1,9}}' for i in range(60_000))},
  ],
)
def test_what_takes_too_much_to_be_compiled_is_refused(
  said: dict[str, Any],
) -> None:
  with pytest.raises(errors.InvalidRequestError):
    _grammars().compile(Params(**said))


_LETTERS = ''.join(random.Random(0).choices('abcdefghij ', k=32_000))


@pytest.mark.parametrize(
  'said',
  [
    {'grammar': f'start: %regex {{"substring_chars": "{_LETTERS}"}}'},
    {'choice': [_LETTERS[i : i + 8] for i in range(0, 32_000, 8)]},
    {'json': {'const': '日' * 10_000}},
    {'json': {'type': 'object', 'properties': {
      f'p{i}': {'type': 'string', 'pattern': f'^[a-z]{{1,{i + 1}}}$'}
      for i in range(200)}}},
    {'json': {'type': 'string', 'minLength': 9_999, 'maxLength': 30_000}},
  ],
)  # fmt: skip
def test_what_is_large_but_plain_is_compiled(said: dict[str, Any]) -> None:
  of = _grammars()
  matcher = of.compile(Params(**said)).matchers(types.SamplingParams())[0]
  for _ in range(40):
    matcher.consume([walks.allowed(of.masks([matcher])[0], 320)[-1]])
    if matcher.is_over:
      break
  assert not matcher.fault
