# SPDX-License-Identifier: Apache-2.0
"""Structural tags: which texts are of them, and which are not."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import copy
from typing import Any

import pytest

from sarathi_jax import errors
from sarathi_jax import types
from tests.grammar import walks

_SCHEMA = {
  'type': 'object',
  'properties': {'a': {'type': 'integer'}},
  'required': ['a'],
  'additionalProperties': False,
}
_JSON = '{"a":1}'
_OF_SCHEMA = {'type': 'json_schema', 'json_schema': _SCHEMA}
_ANY = {'type': 'any_text'}


def _const(text: str) -> dict[str, Any]:
  return {'type': 'const_string', 'value': text}


def _tag(begin: str, end: str = '</f>', content: Any = _OF_SCHEMA) -> Any:
  return {'type': 'tag', 'begin': begin, 'content': content, 'end': end}


_TAGS = [_tag('<f=x>'), _tag('<f=y>')]
_X, _Y = f'<f=x>{_JSON}</f>', f'<f=y>{_JSON}</f>'
_CALLS = {'type': 'triggered_tags', 'triggers': ['<f='], 'tags': _TAGS}
_ROW = {'type': 'tags_with_separator', 'tags': _TAGS, 'separator': ', '}
_OF_TOKENS = {  # '<s>' is a token that is no text.
  'type': 'triggered_tags',
  'triggers': ['<s>'],
  'tags': [_tag('<s>y', ''), _tag('<s>z', '<s>'), _tag('<s>w', '<s>', _ANY)],
}
# A format, texts of it, and others.
_CASES: tuple[tuple[Any, list[str], list[str]], ...] = (
  (_const('a "x" \\ ü\n'), ['a "x" \\ ü\n'], ['a', 'a "x"']),
  (_OF_SCHEMA, [_JSON, '{ "a" : 12 }'], ['x' + _JSON, '{}']),
  (_ANY, ['', 'anything </f>\n'], []),
  ({'type': 'regex', 'pattern': '[xy/]+'}, ['x/y'], ['', 'z']),
  (_TAGS[0], [_X], [_JSON, _X + 'x', _Y]),
  (
    _tag('<f=x>', content=_ANY),
    ['<f=x>some <f> text</f>', '<f=x></f>'],
    ['<f=x>some', '<f=x>some</f> text'],
  ),
  (
    {'type': 'sequence', 'elements': [_const('a'), _OF_SCHEMA, _const('b')]},
    [f'a{_JSON}b'],
    [f'a{_JSON}', _JSON],
  ),
  (
    {'type': 'or', 'elements': [_const('a'), _OF_SCHEMA]},
    ['a', _JSON],
    ['a' + _JSON],
  ),
  (
    _CALLS,
    ['', 'text', _X, f'hi {_X} and {_Y} bye', _X + _Y],
    ['<f=z>', _X + '<f=', 'a <f=x>{}'],
  ),
  (_CALLS | {'at_least_one': True}, [_X, f'hi {_X}{_Y} x'], ['', 'text']),
  (_CALLS | {'stop_after_first': True}, ['', 'a', 'a ' + _X], [_X + ' x']),
  (
    _CALLS | {'stop_after_first': True, 'at_least_one': True},
    [_X, 'hi ' + _X],
    ['', 'x', _X + ' x'],
  ),
  (_ROW, ['', _X, f'{_X}, {_Y}, {_X}'], [_X + _Y, _X + ', ', 'x' + _X]),
  (_ROW | {'at_least_one': True}, [_X, f'{_X}, {_Y}'], ['']),
  (_ROW | {'stop_after_first': True}, ['', _X], [f'{_X}, {_Y}']),
  (
    _OF_TOKENS,
    [
      f'text<s>y{_JSON}',
      f'a<s>z{_JSON}<s>more',
      '<s>w is this<s>',
      f'text<s>y{_JSON}<s>w?<s>',
    ],
    ['a<s>v', '<s>w is', f'<s>z{_JSON}'],
  ),
)


def _is_of(tag: Any, text: str) -> bool:
  of = walks.grammars()
  grammar = of.compile(types.StructuredOutputsParams(structural_tag=tag))
  matcher = grammar.matchers(types.SamplingParams())[0]
  tokens = of._tokenizer.encode(text, add_special_tokens=False)
  inner = matcher.inner
  return bool(
    inner.try_consume_tokens(list(tokens)) == len(tokens)
    and inner.is_accepting()
  )


@pytest.mark.parametrize('form, good, bad', _CASES)
def test_texts_of_a_format(form: Any, good: list[str], bad: list[str]) -> None:
  tag = {'type': 'structural_tag', 'format': form}
  for text in good:
    assert _is_of(tag, text), text
  for text in bad:
    assert not _is_of(tag, text), text


def test_the_older_form() -> None:
  tag = {
    'triggers': ['<f='],
    'structures': [{'begin': '<f=x>', 'schema': _SCHEMA, 'end': '</f>'}],
  }
  for text in ('', 'hi', f'a {_X} b {_X}'):
    assert _is_of(tag, text) and _is_of(tag | {'type': 'structural_tag'}, text)
  assert not _is_of(tag, _Y)


@pytest.mark.parametrize(
  'tag, says',
  [
    ({}, 'structures=None: is missing'),
    ({'format': {'type': 'odd'}}, "type 'odd' is not supported"),
    ({'format': {'type': ['or']}}, 'is not supported'),
    ({'format': []}, r'format=\[\]: is missing'),
    ({'format': {'type': 'or', 'elements': []}}, 'must not be empty'),
    ({'format': {'type': 'or', 'elements': [1]}}, '1: must be an object'),
    ({'format': {'type': 'sequence', 'elements': 'ab'}}, 'another type'),
    ({'format': _tag('a') | {'end': None}}, 'end=None'),
    ({'format': _tag('a') | {'content': None}}, 'content=None'),
    ({'format': _CALLS | {'triggers': ['<g']}}, 'has none of the triggers'),
    ({'format': _CALLS | {'triggers': [5]}}, r'triggers=\[5\]: must be texts'),
    ({'format': _CALLS | {'triggers': [[]]}}, r'triggers=\[\[\]\]: must be'),
    ({'format': _CALLS | {'triggers': ['<f=', None]}}, 'must be texts'),
    ({'format': _CALLS | {'triggers': ['<f=', '']}}, 'that are not empty'),
    (
      {
        'triggers': [{}],
        'structures': [{'begin': '', 'schema': {}, 'end': ''}],
      },
      'must be texts',
    ),
    ({'format': _ROW | {'tags': [5]}}, 'begin=None'),
    ({'format': _ROW | {'separator': 5}}, 'separator=5'),
    ({'format': _CALLS | {'at_least_one': 1}}, 'at_least_one=1'),
    (
      {'format': {'type': 'json_schema', 'json_schema': {'type': 'x'}}},
      'Invalid type: x',
    ),
    ({'format': {'type': 'regex', 'pattern': '['}}, 'unclosed character class'),
    (
      {
        'structures': [{'begin': 'a', 'schema': '{', 'end': ''}],
        'triggers': ['a'],
      },
      'Expecting property name',
    ),
  ],
)
def test_what_is_no_tag_is_refused(tag: Any, says: str) -> None:
  with pytest.raises(errors.InvalidRequestError, match=says):
    _is_of(tag, '')


def test_a_deep_tag_is_refused() -> None:
  tag: Any = _const('a')
  for _ in range(400):
    tag = {'type': 'or', 'elements': [tag]}
  with pytest.raises(errors.InvalidRequestError):
    _is_of({'format': tag}, 'a')


_ODD = (
  None,
  True,
  5,
  1e300,
  '',
  'a\ud800',
  '\x00',
  [],
  [[]],
  [None],
  {},
  {'type': 5},
)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
  """Yields each part of a tag: what it is in, and where in that."""
  pairs = value.items() if isinstance(value, dict) else enumerate(value)
  for key, part in list(pairs):
    yield value, key
    if isinstance(part, dict | list):
      yield from _places(part)


@pytest.mark.parametrize(
  'tag',
  [
    *({'format': form} for form, _, _ in _CASES),
    {
      'triggers': ['<f='],
      'structures': [{'begin': '<f=x>', 'schema': _SCHEMA, 'end': '</f>'}],
    },
  ],
)
def test_a_part_of_any_other_kind_is_taken_or_refused(tag: Any) -> None:
  """By an error that is told, whatever has taken its place."""
  tag = copy.deepcopy(tag)
  for within, key in list(_places(tag)):
    kept = within[key]
    for odd in _ODD:
      within[key] = odd
      with contextlib.suppress(errors.SarathiError):
        walks.grammars().compile(
          types.StructuredOutputsParams(structural_tag=tag)
        )
    within[key] = kept
