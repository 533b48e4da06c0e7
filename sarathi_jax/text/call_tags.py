# SPDX-License-Identifier: Apache-2.0
"""Says what a reply has to be: its reasoning, its calls, or an answer.

So a model that must call is held to the form in which it writes calls anyway,
and the reader of replies needs no other. What a client asks of an answer holds
for neither what the model thinks nor its calls.
"""

from __future__ import annotations

from collections.abc import Mapping
import json
from typing import Any

from sarathi_jax import errors
from sarathi_jax import structured_outputs
from sarathi_jax.text import chats
from sarathi_jax.text import reply_formats

_Format = dict[str, Any]
_Params = structured_outputs.StructuredOutputsParams
_ID = 'tool:arguments'  # of a schema within another


def outputs_of(
  formats: reply_formats.Formats,
  chat: chats.Chat | None,
  prompt_end: str,
  answer: _Params | None = None,
) -> _Params | None:
  """Returns what the reply to a prompt has to be; None for anything.

  Args:
    formats: how the model writes.
    chat: the chat; None if there are no tools.
    prompt_end: the last characters of the prompt, by which it is seen whether
      the model thinks.
    answer: what a client asks of an answer; None for anything. A structural tag
      says of all but the reasoning what it is, calls as well.

  Raises:
    InvalidRequestError: it asks for calls that must be in two ways.
  """
  reply = None
  if chat is not None and formats.tools is not None and chat.callable:
    reply = _with_calls(formats.tools, chat, answer)
  has_calls = reply is not None
  reasoning = _reasoning(formats.reasoning, prompt_end)
  if reply is None:
    if answer is None or not reasoning:
      return answer
    reply = {**structured_outputs.ANSWER}
  tag: Any = {'format': _sequence(*reasoning, reply)}
  return structured_outputs.ReplyParams(
    structural_tag=tag, answer=answer, has_calls=has_calls
  )


def _with_calls(
  form: reply_formats.ToolFormat, chat: chats.Chat, answer: _Params | None
) -> _Format | None:
  """Returns what a reply with calls has to be; None if tools don't say."""
  must_call = chat.tool_choice != chats.AUTO
  is_strict = any(map(_is_strict, chat.offered))
  if answer is not None and answer.structural_tag is not None:
    if must_call or is_strict:
      raise errors.InvalidRequestError(
        'tools: that must be called, or are strict, exclude '
        f'{answer.named(answer.kind)} with a structural tag.'
      )
    return None
  if not (must_call or is_strict or answer is not None):
    return None
  arguments = {
    tool['function']['name']: _arguments(
      tool, held=must_call or _is_strict(tool)
    )
    for tool in chat.offered
    if tool['function']['name'] in chat.callable
  }
  tags = [_tag(form.frame, *item) for item in arguments.items()]
  is_one = chat.named is not None or not chat.parallel_tool_calls
  calls = _sequence(*_calls(form.frame, tags, is_one))
  if must_call:  # There is no answer then.
    return calls
  if answer is None:
    return _maybe_calls(form, tags, is_one)
  if form.is_bare:
    calls = _or(*(_object(form.frame, *item) for item in arguments.items()))
  return _or(calls, {**structured_outputs.ANSWER})


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


def _arguments(tool: Mapping[str, Any], held: bool) -> _Format:
  """Returns the schema of a tool's arguments: its own, if held to it."""
  schema = tool['function'].get('parameters') if held else {}
  if held and not schema:
    schema = {'properties': {}, 'additionalProperties': False}
  return {'type': 'object', **schema}


def _tag(frame: reply_formats.Frame, name: str, arguments: _Format) -> _Format:
  """Returns a call of a tool."""
  return {
    'type': 'tag',
    'begin': f'{frame.begin}{name}{frame.middle}',
    'content': {'type': 'json_schema', 'json_schema': arguments},
    'end': frame.end,
  }


def _object(
  frame: reply_formats.Frame, name: str, arguments: _Format
) -> _Format:
  """Returns a call that is an object, told from an answer as objects are.

  Between texts, of which one begins another, the longer one would be preferred.
  """
  call = json.loads(f'{frame.begin}{name}{frame.middle}null{frame.end}')
  schema = {
    'type': 'object',
    'properties': {
      # By its $id, what it refers to is still within itself.
      key: {'$id': _ID, **arguments} if value is None else {'const': value}
      for key, value in call.items()
    },
    'required': [*call],
    'additionalProperties': False,
  }
  return {'type': 'json_schema', 'json_schema': schema}


def _reasoning(
  form: reply_formats.ReasoningFormat | None, prompt_end: str
) -> list[_Format]:
  """Returns what may come before the reply."""
  if form is None or form.is_over(prompt_end):
    return []
  # No more, as small models never end it.
  space = {'type': 'regex', 'pattern': r'[ \t\r\n]{0,4}'}
  thought = [_until(form.end), space]
  if form.is_begun(prompt_end):
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
