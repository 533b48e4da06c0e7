# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: RUF001
"""Reads calls of tools, each in one way to write them; see `reply_formats`."""

from __future__ import annotations

from collections.abc import Mapping
import json
import re
from typing import Any

from sarathi_jax.text import call_arguments
from sarathi_jax.text import incremental
from sarathi_jax.text import literals

_MOST_NAME = 256
_MOST_KEY = 64
_MOST_ARGUMENTS_AS_TEXT = 2**20
_NAME = re.compile(r'[\w./:-]+')
_WORD = re.compile(r'\w+')
_HEADER = re.compile(r'[\w ]+')
_ELEMENT_NAME = re.compile(r'[^<>\n]+')
_ELEMENT_ENDS = ('\n</parameter>', '</parameter>')
MalformedError = incremental.MalformedError


class Caller:
  """What a format tells of the calls that it reads; see `reply_reader`."""

  def begin(self, name: str) -> Mapping[str, Any]:
    """Begins a call, and returns the schema of the tool's arguments.

    Raises:
      MalformedError: no such tool was offered.
    """
    raise NotImplementedError

  def add(self, arguments: str) -> None:
    """Adds to the arguments of the call."""
    raise NotImplementedError

  def end(self) -> None:
    """Ends the call: its arguments are whole."""
    raise NotImplementedError


def _json_call(
  source: incremental.Source, caller: Caller, *, must_have_arguments: bool
) -> incremental.Waiting[None]:
  """Reads {"name": ..., "arguments": {...}}, its keys in any order."""
  if not (yield from source.literal('{')):
    raise MalformedError
  name: str | None = None
  early: list[str] = []  # arguments that came before the name
  has_begun = False
  while True:
    yield from source.space()
    key = yield from source.text(_MOST_KEY)
    yield from source.space()
    if not (yield from source.literal(':')):
      raise MalformedError
    yield from source.space()
    if key == 'name' and name is None:
      name = yield from source.text(_MOST_NAME)
      if early:
        caller.begin(name)
        caller.add(''.join(early))
        has_begun = True
    elif key in ('arguments', 'parameters') and not (early or has_begun):
      if name is None:
        yield from _arguments(source, early.append)
      else:
        known = name

        def out(text: str, known: str = known) -> None:
          nonlocal has_begun
          if not has_begun:
            caller.begin(known)
            has_begun = True
          caller.add(text)

        yield from _arguments(source, out)
    elif key in ('name', 'arguments', 'parameters'):
      raise MalformedError  # twice
    else:  # an id, a type
      yield from source.value(lambda text: None)
    yield from source.space()
    if (yield from source.literal('}')):
      break
    if not (yield from source.literal(',')):
      raise MalformedError
  if not has_begun:
    if name is None or must_have_arguments:
      raise MalformedError
    caller.begin(name)
    caller.add('{}')
  caller.end()


def _arguments(
  source: incremental.Source, out: incremental.Out
) -> incremental.Waiting[None]:
  """Reads arguments: an object, or one as a text, or null for an empty one."""
  char = yield from source.next()
  if char == '{':
    yield from source.value(out)
  elif char == '"':
    inner = incremental.Source()
    inner.feed((yield from source.text(_MOST_ARGUMENTS_AS_TEXT)).strip(), True)
    if (yield from inner.next()) != '{':
      raise MalformedError
    parts: list[str] = []
    yield from inner.value(parts.append)
    if (yield from inner.next()):
      raise MalformedError
    out(''.join(parts))
  elif (yield from source.literal('null')):
    out('{}')
  else:
    raise MalformedError


def _json_calls(
  source: incremental.Source, caller: Caller
) -> incremental.Waiting[None]:
  """Reads one call, or a list of calls."""
  yield from source.space()
  if not (yield from source.literal('[')):
    yield from _json_call(source, caller, must_have_arguments=False)
    return
  while True:
    yield from source.space()
    yield from _json_call(source, caller, must_have_arguments=False)
    yield from source.space()
    if (yield from source.literal(']')):
      return
    if not (yield from source.literal(',')):
      raise MalformedError


def hermes(
  source: incremental.Source, caller: Caller, mark: str
) -> incremental.Waiting[None]:
  """Reads what is between <tool_call> and </tool_call>."""
  yield from _json_calls(source, caller)
  yield from source.space()
  yield from source.literal('</tool_call>')


def granite(
  source: incremental.Source, caller: Caller, mark: str
) -> incremental.Waiting[None]:
  """Reads the list of calls after <|tool_call|>, which nothing ends."""
  yield from _json_calls(source, caller)


def phi4_mini(
  source: incremental.Source, caller: Caller, mark: str
) -> incremental.Waiting[None]:
  """Reads a list of calls, or one; the last mark is often left out."""
  yield from _json_calls(source, caller)
  yield from source.space()
  yield from source.literal('<|/tool_call|>')


def glm4(
  source: incremental.Source, caller: Caller, mark: str
) -> incremental.Waiting[None]:
  """Reads a name on a line of its own, and its arguments."""
  name = yield from source.run(_NAME, _MOST_NAME)
  if not (yield from source.literal('\n')):
    raise MalformedError
  yield from source.space()
  yield from _named(source, caller, name)


def olmo3(
  source: incremental.Source, caller: Caller, mark: str
) -> incremental.Waiting[None]:
  """Reads calls as Python writes them, a line each, and </function_calls>."""
  has_calls = False
  while True:
    yield from source.space()
    if has_calls and (yield from source.literal('</function_calls>')):
      return
    name = yield from source.run(_NAME, _MOST_NAME)
    if has_calls and not name:
      return
    if not (yield from source.literal('(')):
      raise MalformedError
    caller.begin(name)
    yield from _python_arguments(source, caller)
    caller.end()
    has_calls = True


def _python_arguments(
  source: incremental.Source, caller: Caller
) -> incremental.Waiting[None]:
  """Reads name=value, ... and ), and tells them as an object."""
  caller.add('{')
  separator = ''
  while True:
    yield from source.space()
    if (yield from source.literal(')')):
      break
    if separator:
      if not (yield from source.literal(',')):
        raise MalformedError
      yield from source.space()
      if (yield from source.literal(')')):
        break
    key = yield from source.run(_WORD, _MOST_KEY)
    yield from source.space()
    if not key or not (yield from source.literal('=')):
      raise MalformedError
    caller.add(f'{separator}{json.dumps(key, ensure_ascii=False)}: ')
    separator = ', '
    yield from source.space()
    yield from literals.value(source, caller.add)
  caller.add('}')


def qwen3_coder(
  source: incremental.Source, caller: Caller, mark: str
) -> incremental.Waiting[None]:
  """Reads <function=NAME>, an element for each argument, and the ends."""
  yield from source.space()
  if not (yield from source.literal('<function=')):
    raise MalformedError
  name = yield from source.run(_NAME, _MOST_NAME)
  if not (yield from source.literal('>')):
    raise MalformedError
  yield from _elements(
    source,
    caller,
    name,
    '<parameter=',
    ('>', '\n'),
    '</function>',
    _ELEMENT_ENDS,
  )
  yield from source.space()
  yield from source.literal('</tool_call>')


def glm45(
  source: incremental.Source, caller: Caller, mark: str
) -> incremental.Waiting[None]:
  """Reads a name, elements of a key and of a value, and </tool_call>."""
  yield from source.space()
  name = yield from source.run(_NAME, _MOST_NAME)
  yield from _elements(
    source,
    caller,
    name,
    '<arg_key>',
    ('</arg_key>', '\n', '<arg_value>'),
    '</tool_call>',
    ('</arg_value>',),
  )


def _elements(
  source: incremental.Source,
  caller: Caller,
  name: str,
  before: str,
  between: tuple[str, ...],
  end: str,
  ends: tuple[str, ...],
) -> incremental.Waiting[None]:
  """Reads the arguments of a call of `name`, and tells them as an object.

  Args:
    source, caller: see the readers.
    name: of the tool.
    before: what each key is after.
    between: what is between a key and its value; a line's end may be missing.
    end: what ends all of them.
    ends: what may end a value.
  """
  properties = caller.begin(name).get('properties') or {}
  caller.add('{')
  separator = ''
  while True:
    yield from source.space()
    if (yield from source.literal(end)):
      break
    if not (yield from source.literal(before)):
      raise MalformedError
    key = yield from source.run(_ELEMENT_NAME, _MOST_KEY)
    for part in between:
      if not (yield from source.literal(part)) and part != '\n':
        raise MalformedError
    caller.add(f'{separator}{json.dumps(key, ensure_ascii=False)}: ')
    separator = ', '
    yield from _element(source, caller, properties.get(key), ends)
  caller.add('}')
  caller.end()


def _element(
  source: incremental.Source, caller: Caller, schema: Any, ends: tuple[str, ...]
) -> incremental.Waiting[None]:
  """Reads a value as it is, and its end; tells a text, or else JSON."""
  kinds = call_arguments.kinds(schema)
  if kinds == {'string'}:
    caller.add('"')
    mark = yield from source.until(
      ends, lambda text: caller.add(literals.escaped(text))
    )
    if not mark:
      raise MalformedError
    caller.add('"')
    return
  parts: list[str] = []
  if not (yield from source.until(ends, parts.append)):
    caller.add(''.join(parts))
    raise MalformedError
  text = ''.join(parts)
  caller.add(_as_json(text, may_be=not kinds <= {'string', 'null'}))


def _as_json(text: str, may_be: bool) -> str:
  """Returns the JSON of a value, whose text may be JSON itself."""
  word = literals.WORDS.get(text.strip(), text.strip())
  if may_be:
    try:
      json.loads(word, parse_constant=_refuse)
      return word
    except (ValueError, RecursionError):
      pass
  return 'null' if word == 'null' else json.dumps(text, ensure_ascii=False)


def _refuse(word: str) -> None:
  raise ValueError(word)


def mistral(
  source: incremental.Source, caller: Caller, mark: str
) -> incremental.Waiting[None]:
  """Reads [{"name": ..., "arguments": {...}}], or later ones' NAME[ARGS]{...}.

  The latter may have an id, NAME[CALL_ID]ID[ARGS]{...}.
  """
  yield from source.space()
  if (yield from source.next()) in ('[', '{'):
    yield from _json_calls(source, caller)
    return
  name = yield from source.run(_NAME, _MOST_NAME)
  if (yield from source.literal('[CALL_ID]')):
    yield from source.run(_NAME, _MOST_KEY)
  yield from source.literal('[ARGS]')
  yield from source.space()
  yield from _named(source, caller, name)


def harmony(
  source: incremental.Source, caller: Caller, mark: str
) -> incremental.Waiting[None]:
  """Reads a call of a function: its name, the rest of a header, arguments.

  The channel is before or after the name, and the kind of arguments is marked
  or not.
  """
  name = yield from source.run(_NAME, _MOST_NAME)
  while not (yield from source.literal('<|message|>')):
    is_known = (
      (yield from source.run(_HEADER, _MOST_NAME))
      or (yield from source.literal('<|channel|>'))
      or (yield from source.literal('<|constrain|>'))
    )
    if not is_known:
      raise MalformedError
  yield from source.space()
  yield from _named(source, caller, name)
  yield from source.space()
  yield from source.literal('<|call|>')


def _named(
  source: incremental.Source, caller: Caller, name: str
) -> incremental.Waiting[None]:
  """Reads the arguments of a call whose name is known."""
  if (yield from source.next()) != '{':
    raise MalformedError
  caller.begin(name)
  yield from source.value(caller.add)
  caller.end()


def llama(
  source: incremental.Source, caller: Caller, mark: str
) -> incremental.Waiting[None]:
  """Reads {"name": ..., "parameters": {...}}; several have ; between them."""
  while True:
    yield from source.space()
    yield from _json_call(source, caller, must_have_arguments=True)
    yield from source.space()
    has_more = yield from source.literal(';')
    yield from source.space()
    if not has_more and (yield from source.next()) != '{':
      return


SEP, END = '<｜tool▁sep｜>', '<｜tool▁call▁end｜>'


def deepseek(
  source: incremental.Source, caller: Caller, mark: str
) -> incremental.Waiting[None]:
  """Reads function SEP NAME, and JSON in a fence; or V3.1's NAME SEP {...}."""
  name = yield from source.run(_NAME, _MOST_NAME)
  if not (yield from source.literal(SEP)):
    raise MalformedError
  if (yield from source.next()) == '{':
    yield from _named(source, caller, name)
  else:
    name = yield from source.run(_NAME, _MOST_NAME)
    if not (yield from source.literal('\n```json\n')):
      raise MalformedError
    yield from _named(source, caller, name)
    yield from source.space()
    yield from source.literal('```')
  yield from source.space()
  yield from source.literal(END)
