# SPDX-License-Identifier: Apache-2.0
"""Says what a reply has to be: its reasoning, its calls, or an answer.

So a model that must call is held to the form in which it writes calls anyway,
and the reader of replies needs no other. What a client asks of an answer holds
for neither what the model thinks nor its calls.
"""

from __future__ import annotations

from collections.abc import Mapping
import json
import re
from typing import Any

from sarathi_jax import errors
from sarathi_jax import structured_outputs
from sarathi_jax.text import call_arguments
from sarathi_jax.text import chats
from sarathi_jax.text import reply_formats
from sarathi_jax.text import tags

_Format = tags.Format
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
  thinks = formats.reasoning
  if thinks is not None and thinks.is_over(prompt_end):
    thinks = None
  mark = thinks.answer if thinks else ''
  if chat is not None and formats.tools is not None and chat.callable:
    reply = _with_calls(formats.tools, chat, answer, mark)
  has_calls = reply is not None
  if reply is None:
    if answer is None or thinks is None:
      return answer
    reply = _marked(mark, structured_outputs.ANSWER)
  if thinks is not None:
    reply = _after_reasoning(thinks, thinks.is_begun(prompt_end), reply)
  tag: Any = {'format': reply}
  return structured_outputs.ReplyParams(
    structural_tag=tag, answer=answer, has_calls=has_calls
  )


def _marked(mark: str, answer: Mapping[str, Any]) -> _Format:
  """Returns an answer behind what it begins with, if anything."""
  return tags.sequence(tags.text(mark), {**answer}) if mark else {**answer}


def _with_calls(
  form: reply_formats.ToolFormat,
  chat: chats.Chat,
  answer: _Params | None,
  mark: str,
) -> _Format | None:
  """Returns what a reply with calls has to be; None if tools don't say.

  Args:
    form: how the model writes calls.
    chat: the chat.
    answer: see `outputs_of`.
    mark: what an answer begins with, if anything.
  """
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
  each = [_tag(form.frame, *item) for item in arguments.items()]
  is_one = chat.named is not None or not chat.parallel_tool_calls
  calls = _calls(form.frame, each, is_one)
  if must_call:  # There is no answer then.
    return calls
  if answer is None and mark:
    return tags.one_of(calls, _marked(mark, {'type': 'any_text'}))
  if answer is None:
    return _maybe_calls(form, calls, each, is_one, [*chat.callable])
  if form.bare is reply_formats.Bare.OBJECT:
    calls = tags.one_of(
      *(_object(form.frame, *item) for item in arguments.items())
    )
  return tags.one_of(calls, _marked(mark, structured_outputs.ANSWER))


def _calls(
  frame: reply_formats.Frame, each: list[_Format], is_one: bool
) -> _Format:
  """Returns at least one call, and what is around them."""
  calls = tags.separated(
    each,
    frame.separator or '',
    at_least_one=True,
    stop_after_first=is_one or frame.separator is None,
  )
  return tags.sequence(tags.text(frame.before), calls, tags.text(frame.after))


def _maybe_calls(
  form: reply_formats.ToolFormat,
  calls: _Format,
  each: list[_Format],
  is_one: bool,
  names: list[str],
) -> _Format:
  """Returns any text, but that calls in it are of these tags."""
  frame = form.frame
  if form.bare is reply_formats.Bare.OBJECT:
    other = r'[ \t\r\n]*([^ \t\r\n{](.|\n)*)?'
    return tags.one_of(calls, tags.regex(other))
  if form.bare is reply_formats.Bare.NAME:
    return _call_or_text(calls, [f'{name}{frame.middle}' for name in names])
  if not frame.before:
    return {
      'type': 'triggered_tags',
      'triggers': [form.begins[0]],
      'tags': each,
      'stop_after_first': is_one,
    }
  mark = next(m for m in form.marks if frame.before.startswith(m))
  rest = frame._replace(before=frame.before.removeprefix(mark))
  return tags.one_of(
    tags.sequence(tags.until(mark), _calls(rest, each, is_one)),
    {'type': 'any_text'},
  )


def _call_or_text(calls: _Format, begins: list[str]) -> _Format:
  """Returns calls, or any text that, after space, begins with none.

  Each part of a beginning is a text of its own, and the longest one is taken:
  what comes after it is the rest of a call, or not that.
  """
  nexts: dict[str, set[str]] = {}
  for begin in begins:
    for i, char in enumerate(begin):
      nexts.setdefault(begin[:i], set()).add(char)
  others = [
    tags.sequence(
      tags.text(path),
      tags.one_of(
        tags.text(''),
        tags.sequence(
          tags.regex(f'[^{re.escape("".join(sorted(some)))}{space}]'),
          {'type': 'any_text'},
        ),
      ),
    )
    for path, some in nexts.items()
    for space in ['' if path else r' \t\r\n']
  ]
  space = tags.regex(r'[ \t\r\n]*')
  return tags.sequence(space, tags.one_of(calls, *others))


def _is_strict(tool: Mapping[str, Any]) -> bool:
  return bool(tool['function'].get('strict'))


def _arguments(tool: Mapping[str, Any], held: bool) -> call_arguments.Schema:
  """Returns the schema of a tool's arguments: its own, if held to it."""
  schema = tool['function'].get('parameters') if held else {}
  if held and not schema:
    schema = {'properties': {}, 'additionalProperties': False}
  return {'type': 'object', **schema}


def _tag(
  frame: reply_formats.Frame, name: str, arguments: call_arguments.Schema
) -> _Format:
  """Returns a call of a tool."""
  return tags.tag(
    f'{frame.begin}{name}{frame.middle}', frame.arguments(arguments), frame.end
  )


def _object(
  frame: reply_formats.Frame, name: str, arguments: call_arguments.Schema
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
  return tags.json(schema)


def _after_reasoning(
  form: reply_formats.ReasoningFormat, is_begun: bool, reply: _Format
) -> _Format:
  """Returns a reply after what is thought, if anything is."""
  # No more space, as small models never end it.
  space = tags.regex(r'[ \t\r\n]{0,4}')
  between = tags.text(form.then) if form.then else space
  thought = tags.sequence(tags.until(form.end), between)
  whole = reply
  if form.before:
    whole = tags.sequence(tags.text(form.before), reply, tags.text(form.after))
  if is_begun:
    return tags.sequence(thought, whole)
  thought = tags.sequence(tags.text(form.begin), thought)
  if form.before:
    return tags.one_of(tags.sequence(thought, whole), reply)
  return tags.sequence(tags.one_of(thought, tags.text('')), reply)
