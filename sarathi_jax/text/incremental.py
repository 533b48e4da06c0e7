# SPDX-License-Identifier: Apache-2.0
"""Reads a text that comes in pieces, as if it were there as a whole.

Readers are generators that yield where they need more of the text. So what they
make of a text does not depend on where it was cut, takes time by its length,
and looks like a reader of whole texts.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
import functools
import json
import re
import sys
from typing import TypeVar

_T = TypeVar('_T')
Waiting = Generator[None, None, _T]  # returns a T; yields where it waits
Out = Callable[[str], object]

MOST_LEVELS = 128  # of JSON; beyond it, readers of others give up
_SPACES = ' \t\r\n'
_SPACE = re.compile(r'[ \t\r\n]+')
_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')
_WRITTEN = re.compile(r'(?:[^"\\\x00-\x1f]|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})+')
_CONTROL = re.compile(r'[\x00-\x1f]+')
SCALAR = re.compile(r'[-+.\w]+')
IS_SCALAR = re.compile(
  r'true|false|null|-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?'
)
_HEX = re.compile('[0-9a-fA-F]{4}')
MOST_SCALAR = 64  # characters of a number


class MalformedError(Exception):
  """The text is not what was to be read."""


@functools.lru_cache(64)
def _any_of(marks: tuple[str, ...]) -> re.Pattern[str]:
  """Finds the first of some marks, in one pass; of two there the longer."""
  some = sorted(map(re.escape, marks), key=len, reverse=True)
  return re.compile('|'.join(some) if some else '(?!)')


class Source:
  """A text that comes in pieces; what is read of it is forgotten.

  Attributes:
    record: where to keep what is read, if anywhere.
  """

  def __init__(self) -> None:
    self.record: list[str] | None = None
    self._text = ''
    self._start = 0  # of what is not yet read
    self._is_whole = False

  def feed(self, text: str, is_last: bool) -> None:
    """Adds a piece."""
    self._text = self._text[self._start :] + text
    self._start = 0
    self._is_whole = is_last

  def has(self, num: int = 1) -> Waiting[bool]:
    """Waits until so many characters can be read; False if there are not."""
    while len(self._text) - self._start < num:
      if self._is_whole:
        return False
      yield
    return True

  def next(self) -> Waiting[str]:
    """Returns the next character, which it does not read; '' at the end."""
    return self._text[self._start] if (yield from self.has()) else ''

  def literal(self, text: str) -> Waiting[bool]:
    """Reads `text`, if it is next."""
    while True:
      rest = self._text[self._start : self._start + len(text)]
      if rest == text:
        self._take(len(text))
        return True
      if self._is_whole or not text.startswith(rest):
        return False
      yield

  def take(self, num: int) -> Waiting[str]:
    """Reads so many characters; what is left, if there are not."""
    yield from self.has(num)
    return self._take(num)

  def run(self, pattern: re.Pattern[str], most: int) -> Waiting[str]:
    """Reads what a pattern of repeated characters matches, maybe nothing.

    Raises:
      MalformedError: it is longer than `most` characters.
    """
    parts: list[str] = []
    while (yield from self.has()):
      match = pattern.match(self._text, self._start)
      if match is None:
        break
      part = match[0][: most + 1]
      parts.append(self._take(len(part)))
      most -= len(part)
      if most < 0:
        raise MalformedError
    return ''.join(parts)

  def space(self, out: Out | None = None) -> Waiting[None]:
    """Reads whitespace, and passes it on."""
    while (yield from self.has()):
      match = _SPACE.match(self._text, self._start)
      if match is None:
        return
      part = self._take(len(match[0]))
      if out is not None:
        out(part)

  def until(self, marks: tuple[str, ...], out: Out) -> Waiting[str]:
    """Passes text on until a mark, and reads that.

    Returns:
      The mark; '' at the end of the text.
    """
    find = _any_of(marks)
    while True:
      if found := find.search(self._text, self._start):
        self._pass(found.start() - self._start, out)
        return self._take(len(found[0]))
      held = 0 if self._is_whole else self._num_begun(marks)
      self._pass(len(self._text) - self._start - held, out)
      if self._is_whole:
        return ''
      yield

  def value(self, out: Out) -> Waiting[None]:
    """Passes a JSON value on, as it is written.

    Raises:
      MalformedError: it is none; what was passed on is how far it was one.
    """
    ends: list[str] = []  # of the lists and objects that are open
    expected = 'value'
    while True:
      char = self._text[self._start : self._start + 1]
      if ends and (not char or char in _SPACES):
        yield from self.space(out)
        char = ''
      char = char or (yield from self.next())
      if ends and char == ends[-1] and expected in ('first', 'comma'):
        self._pass(1, out)
        ends.pop()
        expected = 'comma'
      elif expected == 'comma' and char == ',':
        self._pass(1, out)
        expected = 'key' if ends[-1] == '}' else 'value'
      elif expected == 'colon' and char == ':':
        self._pass(1, out)
        expected = 'value'
      elif expected == 'key' or (expected == 'first' and ends[-1] == '}'):
        yield from self.string(out)
        expected = 'colon'
      elif expected in ('value', 'first') and char in ('{', '['):
        self._pass(1, out)
        ends.append('}' if char == '{' else ']')
        expected = 'first'
        if len(ends) > MOST_LEVELS:
          raise MalformedError
      elif expected in ('value', 'first'):
        yield from self.string(out) if char == '"' else self._scalar(out)
        expected = 'comma'
      else:
        raise MalformedError
      if not ends and expected == 'comma':
        return

  def string(self, out: Out, most: int = sys.maxsize) -> Waiting[None]:
    """Passes a JSON string on; characters that must be escaped, so.

    Raises:
      MalformedError: it is none, or has more than `most` characters.
    """
    if (yield from self.next()) != '"':
      raise MalformedError
    self._pass(1, out)
    plain = _WRITTEN if most == sys.maxsize else _PLAIN
    while (char := (yield from self.next())) and most >= 0:
      if char == '"':
        self._pass(1, out)
        return
      num = 1
      if match := plain.match(self._text, self._start):
        num = min(len(match[0]), most + 1)
        self._pass(num, out)
      elif match := _CONTROL.match(self._text, self._start):
        num = min(len(match[0]), most + 1)
        out(json.dumps(self._take(num))[1:-1])
      else:
        yield from self._escape(out)
      most -= num
    raise MalformedError

  def text(self, most: int) -> Waiting[str]:
    """Returns the text that a JSON string is.

    Raises:
      MalformedError: it is none, or longer than `most` characters.
    """
    parts: list[str] = []
    yield from self.string(parts.append, most)
    return str(json.loads(''.join(parts)))

  def _escape(self, out: Out) -> Waiting[None]:
    yield from self.has(2)
    kind = self._text[self._start + 1 : self._start + 2]
    if kind == 'u':
      yield from self.has(6)
      if not _HEX.fullmatch(self._text[self._start + 2 : self._start + 6]):
        raise MalformedError
      self._pass(6, out)
    elif kind and kind in '"\\/bfnrt':
      self._pass(2, out)
    else:
      raise MalformedError

  def _scalar(self, out: Out) -> Waiting[None]:
    match = SCALAR.match(self._text, self._start)
    if match and match.end() < len(self._text) and len(match[0]) < MOST_SCALAR:
      text = self._take(len(match[0]))  # which takes half of the time
    else:
      text = yield from self.run(SCALAR, MOST_SCALAR)
    if not IS_SCALAR.fullmatch(text):
      raise MalformedError
    out(text)

  def _num_begun(self, marks: tuple[str, ...]) -> int:
    """Counts the characters at the end that may begin a mark."""
    most = max(map(len, marks), default=1) - 1
    tail = self._text[max(len(self._text) - most, self._start) :]
    return next(
      (
        len(tail) - i
        for i in range(len(tail))
        if any(mark.startswith(tail[i:]) for mark in marks)
      ),
      0,
    )

  def _pass(self, num: int, out: Out) -> None:
    if num:
      out(self._take(num))

  def _take(self, num: int) -> str:
    part = self._text[self._start : self._start + num]
    self._start += num
    if self.record is not None:
      self.record.append(part)
    return part
