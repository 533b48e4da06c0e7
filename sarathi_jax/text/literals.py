# SPDX-License-Identifier: Apache-2.0
"""Reads values as Python or JSON writes them, and passes them on as JSON."""

from __future__ import annotations

from collections.abc import Mapping
import json
import re
import sys

from sarathi_jax.text import incremental

# Python's words, and the JSON of them; JSON's own are taken as well.
WORDS: Mapping[str, str] = {'True': 'true', 'False': 'false', 'None': 'null'}
_IS_HEX = re.compile('[0-9a-fA-F]+')
_DIGITS: Mapping[str, int] = {'x': 2, 'u': 4, 'U': 8}
_ESCAPES: Mapping[str, str] = {
  **{char: char for char in '"\'\\/'},
  **{'b': '\b', 'f': '\f', 'n': '\n', 'r': '\r', 't': '\t', '\n': ''},
}
_ENDS: Mapping[str, str] = {'[': ']', '(': ')', '{': '}'}


def escaped(text: str) -> str:
  """Returns what a JSON string has of a part of its text."""
  return json.dumps(text, ensure_ascii=False)[1:-1]


def value(
  source: incremental.Source, out: incremental.Out, level: int = 0
) -> incremental.Waiting[None]:
  """Passes a value on: a text, a number, a word, or a list or object of such.

  Raises:
    MalformedError: it is none; what was passed on is how far it was one.
  """
  char = yield from source.next()
  if char in ('"', "'"):
    yield from _text(source, out)
  elif char in _ENDS and level < incremental.MOST_LEVELS:
    yield from _several(source, out, level)
  else:
    word = yield from source.run(incremental.SCALAR, incremental.MOST_SCALAR)
    word = WORDS.get(word, word)
    if not incremental.IS_SCALAR.fullmatch(word):
      raise incremental.MalformedError
    out(word)


def _several(
  source: incremental.Source, out: incremental.Out, level: int
) -> incremental.Waiting[None]:
  """Passes on a list, a tuple or an object; a comma may be its last."""
  begin = yield from source.next()
  yield from source.literal(begin)
  end = _ENDS[begin]
  out('{' if begin == '{' else '[')
  separator = ''
  while True:
    yield from source.space()
    if (yield from source.literal(end)):
      break
    if separator:
      if not (yield from source.literal(',')):
        raise incremental.MalformedError
      yield from source.space()
      if (yield from source.literal(end)):
        break
    out(separator)
    separator = ', '
    if begin == '{':
      yield from _text(source, out)
      yield from source.space()
      if not (yield from source.literal(':')):
        raise incremental.MalformedError
      out(': ')
      yield from source.space()
    yield from value(source, out, level + 1)
  out('}' if begin == '{' else ']')


def _text(
  source: incremental.Source, out: incremental.Out
) -> incremental.Waiting[None]:
  quote = yield from source.next()
  if quote not in ('"', "'"):
    raise incremental.MalformedError
  yield from source.literal(quote)
  out('"')
  while True:
    mark = yield from source.until(
      (quote, '\\'), lambda text: out(escaped(text))
    )
    if mark == quote:
      break
    if not mark:
      raise incremental.MalformedError
    out((yield from _escape(source)))
  out('"')


def _escape(source: incremental.Source) -> incremental.Waiting[str]:
  """Returns what stands in JSON for what is after a backslash."""
  kind = yield from source.next()
  yield from source.literal(kind)
  if kind in _ESCAPES:
    return escaped(_ESCAPES[kind])
  num = _DIGITS.get(kind)
  if num is None:
    return escaped(f'\\{kind}')  # which Python leaves as it is
  code = yield from source.take(num)
  if len(code) != num or not _IS_HEX.fullmatch(code):
    raise incremental.MalformedError
  number = int(code, 16)
  if number > sys.maxunicode:
    raise incremental.MalformedError
  # Half of a pair means nothing by itself.
  is_half = 0xD800 <= number < 0xE000
  return f'\\u{number:04x}' if is_half else escaped(chr(number))
