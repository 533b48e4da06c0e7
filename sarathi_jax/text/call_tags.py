# SPDX-License-Identifier: Apache-2.0
"""Says what an output with calls has to be, as a structural tag.

So a model that must call is held to the form in which it writes calls anyway,
and the reader of replies needs no other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from sarathi_jax import types
from sarathi_jax.text import chats
from sarathi_jax.text import reply_formats

_Format = dict[str, Any]


class ToolOutputs(types.StructuredOutputsParams):
  """What an output with calls has to be; errors name the tools."""

  NAMES: ClassVar[Mapping[str, str]] = {'structural_tag': 'tools'}


def outputs_of(
  formats: reply_formats.Formats, chat: chats.Chat, thinks: bool
) -> ToolOutputs | None:
  """Returns what the reply to a chat has to be; None for anything.

  Args:
    formats: how the model writes.
    chat: the chat.
    thinks: whether its prompt began the reasoning.
  """
  form = formats.tools
  must_call = chat.tool_choice != chats.AUTO
  is_strict = any(map(_is_strict, chat.offered))
  if form is None or not chat.callable or not (must_call or is_strict):
    return None
  tags = [
    _tag(form.frame, tool, held=must_call or _is_strict(tool))
    for tool in chat.offered
    if tool['function']['name'] in chat.callable
  ]
  is_one = chat.named is not None or not chat.parallel_tool_calls
  reply = (
    _sequence(*_calls(form.frame, tags, is_one))
    if must_call
    else _maybe_calls(form, tags, is_one)
  )
  tag: Any = {
    'format': _sequence(*_reasoning(formats.reasoning, thinks), reply)
  }
  return ToolOutputs(structural_tag=tag)


def _calls(
  frame: reply_formats.Frame, tags: list[_Format], is_one: bool
) -> list[_Format]:
  """Returns at least one call, and what is around them."""
  calls = {
    'type': 'tags_with_separator',
    'tags': tags,
    'separator': frame.separator or '',
    'at_least_one': True,
    'stop_after_first': is_one or frame.separator is None,
  }
  return [_text(frame.before), calls, _text(frame.after)]


def _maybe_calls(
  form: reply_formats.ToolFormat, tags: list[_Format], is_one: bool
) -> _Format:
  """Returns any text, but that calls in it are of these tags."""
  frame = form.frame
  if form.is_bare:
    calls = _sequence(*_calls(frame, tags, is_one))
    return _or(
      calls, {'type': 'regex', 'pattern': r'[ \t\r\n]*([^ \t\r\n{](.|\n)*)?'}
    )
  if not frame.before:
    return {
      'type': 'triggered_tags',
      'triggers': [form.begins[0]],
      'tags': tags,
      'stop_after_first': is_one,
    }
  mark = next(m for m in form.marks if frame.before.startswith(m))
  rest = frame._replace(before=frame.before.removeprefix(mark))
  return _or(
    _sequence(_until(mark), *_calls(rest, tags, is_one)), {'type': 'any_text'}
  )


def _is_strict(tool: Mapping[str, Any]) -> bool:
  return bool(tool['function'].get('strict'))


def _tag(
  frame: reply_formats.Frame, tool: Mapping[str, Any], held: bool
) -> _Format:
  """Returns a call of a tool, with arguments of its schema, if held to it."""
  function = tool['function']
  schema = function.get('parameters') if held else {}
  if held and not schema:
    schema = {'properties': {}, 'additionalProperties': False}
  return {
    'type': 'tag',
    'begin': f'{frame.begin}{function["name"]}{frame.middle}',
    'content': {
      'type': 'json_schema',
      'json_schema': {'type': 'object', **schema},
    },
    'end': frame.end,
  }


def _reasoning(
  form: reply_formats.ReasoningFormat | None, thinks: bool
) -> list[_Format]:
  """Returns what may come before the reply."""
  if form is None:
    return []
  # No more, as small models never end it.
  space = {'type': 'regex', 'pattern': r'[ \t\r\n]{0,4}'}
  thought = [_until(form.end), space]
  if thinks:
    return thought
  return [_or(_sequence(_text(form.begin), *thought), _text(''))]


def _until(end: str) -> _Format:
  return {
    'type': 'tag',
    'begin': '',
    'content': {'type': 'any_text'},
    'end': end,
  }


def _sequence(*parts: _Format) -> _Format:
  return {'type': 'sequence', 'elements': [*parts]}


def _or(*parts: _Format) -> _Format:
  return {'type': 'or', 'elements': [*parts]}


def _text(text: str) -> _Format:
  return {'type': 'const_string', 'value': text}
