# SPDX-License-Identifier: Apache-2.0
"""What grammars allow, for each kind of tokenizer; what is refused."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import jsonschema
import pytest

from sarathi_jax import errors
from sarathi_jax import types
from tests.grammar import walks

Params = types.StructuredOutputsParams
_SCHEMA = {
  'type': 'object',
  'properties': {
    'name': {'type': 'string', 'maxLength': 8},
    'größe': {'type': 'integer', 'minimum': -3, 'maximum': 400},
    'tags': {'type': 'array', 'items': {'enum': ['a', 1, None]}, 'maxItems': 3},
    'more': {'$ref': '#/$defs/more'},
  },
  'required': ['größe', 'more'],
  'additionalProperties': False,
  '$defs': {'more': {'anyOf': [{'type': 'boolean'}, {'const': 'no'}]}},
}


@pytest.mark.parametrize('name', ['bytes', 'sentencepiece'])
@pytest.mark.parametrize('compact', [True, False])
def test_json_is_of_its_schema(name: str, compact: bool) -> None:
  outputs = Params(json=_SCHEMA, disable_any_whitespace=compact)
  rng = random.Random(0)
  for _ in range(30):
    tokens, is_over = walks.walk(walks.grammars(name), outputs, rng, most=999)
    text = walks.text_of(name, tokens)
    assert is_over
    jsonschema.validate(json.loads(text), _SCHEMA)
    without_strings = re.sub(r'"(\\.|[^"\\])*"', '""', text)
    assert not compact or not re.search(r'\s', without_strings)


@pytest.mark.parametrize('name', ['bytes', 'sentencepiece'])
@pytest.mark.parametrize(
  'regex',
  [
    '[ab]{2,4}c',
    '(the |fox)+[.]',
    '[0-9]{3}-[0-9]{4}',
    'ä|ö|日本',
    '[^a]{3}',
    r'^([a-c]+@[a-c]{1,9}\.(com|org))$',
    'a{0,3}?b',
  ],
)
def test_all_of_an_output_matches(name: str, regex: str) -> None:
  rng = random.Random(1)
  num_ended = 0
  for _ in range(20):
    tokens, is_over = walks.walk(
      walks.grammars(name), Params(regex=regex), rng, most=40
    )
    if is_over:
      num_ended += 1
      assert re.fullmatch(regex, walks.text_of(name, tokens))
  assert num_ended > 5


@pytest.mark.parametrize('name', ['bytes', 'sentencepiece'])
def test_an_output_is_one_of_its_choices(name: str) -> None:
  choices = 'yes', 'no', 'not at all', 'a.b', '(x|y)', 'a/b\\c', '\n', '"ü"'
  rng = random.Random(2)
  of = walks.grammars(name)
  found = [walks.walk(of, Params(choice=choices), rng) for _ in range(200)]
  assert all(is_over for _, is_over in found)
  assert {walks.text_of(name, tokens) for tokens, _ in found} == {*choices}


def test_words_that_are_tokens() -> None:
  rng = random.Random(3)
  for _ in range(20):
    tokens, is_over = walks.walk(
      walks.grammars('words'), Params(regex='t5t7(t1|t22|t2)*t3'), rng
    )
    assert is_over and tokens[:2] == [5, 7] and tokens[-1] == 3
    assert {*tokens[2:-1]} <= {1, 2, 22}


@pytest.mark.parametrize(
  'grammar', ['start: "x" ("1" | "2")+ "y"', 'root ::= "x" ("1" | "2")+ "y"']
)
def test_an_output_is_of_its_grammar(grammar: str) -> None:
  rng = random.Random(4)
  for _ in range(20):
    tokens, is_over = walks.walk(walks.grammars(), Params(grammar=grammar), rng)
    assert is_over
    assert re.fullmatch('x[12]+y', walks.text_of('bytes', tokens))


def test_a_json_object_begins_and_ends_as_one() -> None:
  of = walks.grammars()
  grammar = of.compile(Params(json_object=True, disable_any_whitespace=True))
  matcher = grammar.matchers(types.SamplingParams())[0]
  brace = of._tokenizer.token_id('{')
  assert walks.allowed(of.masks([matcher])[0], 320) == [brace]


def test_objects_can_be_closed() -> None:
  schema = {'type': 'object', 'properties': {'a': {'const': 1}}}
  rng = random.Random(5)
  for closed in (True, False):
    outputs = Params(json=schema, disable_additional_properties=closed)
    found = {
      frozenset(json.loads(walks.text_of('bytes', tokens)))
      for tokens, is_over in (
        walks.walk(walks.grammars(), outputs, rng) for _ in range(60)
      )
      if is_over
    }
    assert (found <= {frozenset(), frozenset({'a'})}) == closed


def test_a_pattern_of_space() -> None:
  outputs = Params(json={'type': 'array'}, whitespace_pattern='_?')
  rng = random.Random(6)
  texts = {
    walks.text_of('bytes', walks.walk(walks.grammars(), outputs, rng)[0])
    for _ in range(50)
  }
  assert any('_' in t for t in texts) and not any(' [' in t for t in texts)


@pytest.mark.parametrize(
  'said, says',
  [
    ({'json': {'type': 'strin'}}, "json='.*strin.*': Invalid type: strin"),
    ({'json': {'not': {}}}, 'Unimplemented keys: ."not"'),
    ({'json': {'$ref': 'http://x/y'}}, 'does not fetch resources'),
    ({'json': {'oneOf': [{}, {}]}}, 'oneOf constraints are not supported'),
    ({'json': {'pattern': '(?=a)', 'type': 'string'}}, 'look-around'),
    ({'json': {'enum': []}}, 'Unsatisfiable'),
    ({'json': {'$ref': '#'}}, 'no output fits it'),
    ({'regex': r'[^\x00-\x{10FFFF}]'}, 'no output fits it'),
    ({'grammar': 'root ::= root'}, 'no output fits it'),
    ({'regex': '['}, 'unclosed character class'),
    ({'regex': r'(a)\1'}, 'backreferences are not supported'),
    ({'regex': r'\bab'}, 'lookarounds not supported'),
    ({'grammar': 'start: b'}, 'unknown name: "b"'),
    ({'grammar': 'start: <|nobody|>'}, 'nobody'),
    ({'grammar': 'root ::= b |'}, 'grammar=.*'),
    ({'grammar': 'root ::= ' + '(' * 50_000}, 'recursion'),
    ({'json': {'a': {}} | {'type': 'object', 'allOf': 1}}, 'allOf'),
  ],
)
def test_what_is_no_grammar_is_refused_in_the_librarys_words(
  said: dict[str, Any], says: str
) -> None:
  of = walks.grammars()
  for _ in range(2):  # The second time it is known.
    with pytest.raises(errors.InvalidRequestError, match=says) as caught:
      of.compile(Params(**said))
    assert len(str(caught.value)) < 2000
    assert 'llguidance' not in str(caught.value)
    assert 'non-verbose' not in str(caught.value)


def test_what_no_token_spells_is_refused() -> None:
  with pytest.raises(errors.InvalidRequestError, match='no token'):
    walks.grammars('words').compile(Params(regex='abc'))


def test_a_faulty_token_is_a_fault_of_its_output_alone() -> None:
  grammar = walks.grammars().compile(Params(regex='a+'))
  one, other = (grammar.matchers(types.SamplingParams())[0] for _ in range(2))
  token = walks.grammars()._tokenizer.token_id('b')
  assert token is not None
  one.consume([token])
  assert one.is_over and 'does' in one.fault
  assert not other.is_over and not other.fault


def test_what_ends_an_output() -> None:
  of = walks.grammars()
  a = of._tokenizer.token_id('a')
  grammar = of.compile(Params(regex='aa+'))

  def may_come(num: int, **sampling: Any) -> set[int]:
    matcher = grammar.matchers(types.SamplingParams(**sampling))[0]
    matcher.consume([a] * num)
    return {*walks.allowed(of.masks([matcher])[0], 320)} & {walks.EOS, 7, 8}

  for num in (0, 1):
    assert may_come(num, stop_token_ids=(7, 8)) == set()
  assert may_come(2) == {walks.EOS}
  assert may_come(2, stop_token_ids=(7, 8)) == {walks.EOS, 7, 8}
  assert may_come(2, ignore_eos=True) == set()
  assert may_come(2, ignore_eos=True, stop_token_ids=(7,)) == {7}


def test_only_an_empty_output_fits() -> None:
  assert walks.grammars().compile(Params(choice=[''])).is_empty
  assert not walks.grammars().compile(Params(choice=['', 'a'])).is_empty


def test_grammars_are_kept_by_what_they_say() -> None:
  of = walks.grammars()
  first = of.compile(Params(json={'type': 'null'}))
  assert of.compile(Params(json='{"type":  "null"}')) is first
  compact = Params(json={'type': 'null'}, disable_any_whitespace=True)
  assert of.compile(compact) is not first


def test_a_grammar_whose_first_mask_is_too_large_is_refused() -> None:
  rules = ' '.join('("a" | "b"{1,50})*' for _ in range(1500))
  with pytest.raises(errors.InvalidRequestError, match='Too many items'):
    walks.grammars().compile(Params(grammar=f'start: {rules}'))
