# SPDX-License-Identifier: Apache-2.0
"""Writes structural tags as grammars in Lark's syntax.

A structural tag says where in free text there is structure, as in calls of
tools. There are two forms: {"structures": [{begin, schema, end}], "triggers":
[...]}, and {"format": {...}}, which is made of what `_FORMATS` names, by
xgrammar's meanings. Text that is an added token of the model may be written
as that token, or letter by letter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import json
import re
from typing import Any

import llguidance

from sarathi_jax import errors
from sarathi_jax import structured_outputs

_ANY = '/(?s:.*)/'


class Writer:
  """Writes one grammar.

  Args:
    added: the texts of the model's added tokens, by id; only as these tokens
      does it write them.
    answer: the name of the grammar that `ANSWER` stands for, in a tag of ours;
      '' in one of a client's.
  """

  def __init__(self, added: Mapping[int, str], answer: str = '') -> None:
    self._answer = answer
    self._added = {text: token for token, text in added.items()}
    texts = sorted(map(re.escape, self._added), key=len, reverse=True)
    self._find = re.compile('|'.join(texts)) if texts else None
    self._rules: list[str] = []

  def write(self, tag: Mapping[str, Any]) -> str:
    """Returns the grammar of a structural tag.

    Raises:
      InvalidRequestError: it is of neither form.
    """
    if 'format' in tag:
      body = self._format(_of(tag, 'format', dict))
    else:
      body = self._format(_from_legacy(tag))
    return '\n'.join([f'start: {body}', *self._rules])

  def _format(self, said: Any) -> str:
    """Returns a part of a rule that is what a format describes."""
    _check(isinstance(said, dict), f'{errors.shown(said)}: must be an object')
    if self._answer and said == structured_outputs.ANSWER:
      return f'@{self._answer}'
    kind = said.get('type')
    writer = _FORMATS.get(kind) if isinstance(kind, str) else None
    if writer is None:
      raise errors.UnsupportedError(
        f'structural_tag: a format of type {errors.shown(kind)} is not '
        f'supported; those of {", ".join(_FORMATS)} are.'
      )
    return writer(self, said)

  def _rule(self, body: str, attributes: str = '') -> str:
    name = f'r{len(self._rules)}'
    self._rules.append(f'{name}{attributes}: {body}')
    return name

  def _text(self, text: str) -> str:
    """Returns a part that is a text.

    The lexer prefers what is longer, and never turns back. So in a tag of ours
    a text that may stand beside an answer has its first character by itself, or
    is a token: else an answer of which the first word begins the text could not
    go on otherwise.
    """
    if not text:
      return '""'
    parts, start = [], 0
    for match in self._find.finditer(text) if self._find else ():
      if match.start() > start:
        parts.append(_quoted(text[start : match.start()]))
      parts.append(self._token(match[0]))
      start = match.end()
    if self._answer and not start:
      parts, start = [_quoted(text[0])], 1
    if start < len(text):
      parts.append(_quoted(text[start:]))
    return ' '.join(parts)

  def _token(self, text: str) -> str:
    """Returns a part that is an added token, by its id or as a client may."""
    token = f'<[{self._added[text]}]>'
    return token if self._answer else f'({token} | {_quoted(text)})'

  def _until(self, end: str) -> str:
    """Returns a part that is any text up to some, and that."""
    if not end:
      return _ANY
    found = self._rule(f'{_ANY} {_quoted(end)}', '[lazy]')
    if end in self._added:
      return f'({_ANY} <[{self._added[end]}]> | {found})'
    return found

  def _const_string(self, said: Mapping[str, Any]) -> str:
    return self._text(_of(said, 'value', str))

  def _json_schema(self, said: Mapping[str, Any]) -> str:
    return of_schema(_of(said, 'json_schema', dict | bool))

  def _any_text(self, said: Mapping[str, Any]) -> str:
    del said
    return _ANY

  def _regex(self, said: Mapping[str, Any]) -> str:
    return of_regex(_of(said, 'pattern', str))

  def _sequence(self, said: Mapping[str, Any]) -> str:
    return f'({" ".join(map(self._format, _some(said, "elements")))})'

  def _or(self, said: Mapping[str, Any]) -> str:
    return f'({" | ".join(map(self._format, _some(said, "elements")))})'

  def _tag(self, said: Mapping[str, Any]) -> str:
    return f'({self._text(_of(said, "begin", str))} {self._rest(said)})'

  def _rest(self, said: Mapping[str, Any]) -> str:
    """Returns what a tag has after its beginning."""
    content, end = _of(said, 'content', dict), _of(said, 'end', str)
    if content.get('type') == 'any_text':
      return self._until(end)
    return f'{self._format(content)} {self._text(end)}'

  def _triggered_tags(self, said: Mapping[str, Any]) -> str:
    triggers, tags = _triggers(said), _some(said, 'tags')
    rests: dict[str, list[str]] = {trigger: [] for trigger in triggers}
    for tag in tags:
      begin = _of(tag, 'begin', str)
      trigger = next((t for t in triggers if begin.startswith(t)), None)
      _check(
        trigger is not None,
        f'the beginning {errors.shown(begin)} has none of the triggers '
        f'{errors.shown(triggers)}',
      )
      assert trigger is not None
      after = begin[len(trigger) :]
      rests[trigger].append(f'{self._text(after)} {self._rest(tag)}')
    calls = ' | '.join(
      f'{self._until(trigger)} ({" | ".join(some)})'
      for trigger, some in rests.items()
      if some
    )
    least = _flag(said, 'at_least_one')
    if _flag(said, 'stop_after_first'):
      return f'({calls})' if least else f'(({calls}) | {_ANY})'
    return f'(({calls}){"+" if least else "*"} {_ANY})'

  def _tags_with_separator(self, said: Mapping[str, Any]) -> str:
    tag = self._rule(' | '.join(map(self._tag, _some(said, 'tags'))))
    separator = self._text(_of(said, 'separator', str))
    least = _flag(said, 'at_least_one')
    tags = tag
    if not _flag(said, 'stop_after_first'):
      tags = f'{tag} ({separator} {tag})*'
    return f'({tags})' if least else f'({tags})?'


_FORMATS: Mapping[str, Callable[[Writer, Mapping[str, Any]], str]] = {
  'const_string': Writer._const_string,
  'json_schema': Writer._json_schema,
  'any_text': Writer._any_text,
  'regex': Writer._regex,
  'sequence': Writer._sequence,
  'or': Writer._or,
  'tag': Writer._tag,
  'triggered_tags': Writer._triggered_tags,
  'tags_with_separator': Writer._tags_with_separator,
}


def _from_legacy(tag: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the older form as a format."""
  tags = []
  for item in _some(tag, 'structures'):
    schema = _of(item, 'schema', dict | str)
    tags.append(
      {
        'begin': _of(item, 'begin', str),
        'content': {
          'type': 'json_schema',
          'json_schema': json.loads(schema)
          if isinstance(schema, str)
          else schema,
        },
        'end': _of(item, 'end', str),
      }
    )
  return {
    'type': 'triggered_tags',
    'triggers': _triggers(tag),
    'tags': tags,
  }


def of_schema(schema: Mapping[str, Any] | bool) -> str:
  """Returns a part of a rule that is JSON of a schema."""
  return f'%json {json.dumps(schema)}'


def of_regex(pattern: str) -> str:
  """Returns a part of a rule that matches a regular expression."""
  return f'/{llguidance.regex_to_lark(pattern, "")}/'


def _quoted(text: str) -> str:
  return json.dumps(text, ensure_ascii=False)


def _of(said: Any, name: str, kind: Any) -> Any:
  value = said.get(name) if isinstance(said, dict) else None
  _check(
    isinstance(value, kind),
    f'{name}={errors.shown(value)}: is missing, or of another type',
  )
  return value


def _some(said: Mapping[str, Any], name: str) -> Sequence[Any]:
  values: list[Any] = _of(said, name, list)
  _check(bool(values), f'{name}: must not be empty')
  return values


def _triggers(said: Mapping[str, Any]) -> Sequence[str]:
  triggers = _some(said, 'triggers')
  _check(
    all(isinstance(trigger, str) and trigger for trigger in triggers),
    f'triggers={errors.shown(triggers)}: must be texts that are not empty',
  )
  return triggers


def _flag(said: Mapping[str, Any], name: str) -> bool:
  return bool(_of({name: False, **said}, name, bool))


def _check(ok: bool, problem: str) -> None:
  if not ok:
    raise errors.InvalidRequestError(f'structural_tag: {problem}.')
