# SPDX-License-Identifier: Apache-2.0
"""Prepares a chat's messages, as OpenAI has them, for a chat template.

Templates were written for texts. OpenAI's messages may have a list of parts
instead, null, or arguments as JSON, which would get into the prompt as Python
prints them. vLLM, SGLang and the gateway turn them into texts first, and so
does this.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
import enum
import json
from typing import Any

from jinja2 import nodes

from sarathi_jax import errors

# Type of a part -> the field that holds its text.
_TEXTS: Mapping[str, str] = {
  'text': 'text',
  'input_text': 'text',
  'output_text': 'text',
  'refusal': 'refusal',
}


class NoText(str):
  """The empty text that stands for null: a template's `is none` is true."""

  def __eq__(self, other: object) -> bool:
    return other is None or str.__eq__(self, other)

  def __ne__(self, other: object) -> bool:
    return not self == other

  __hash__ = str.__hash__


class _Arguments(dict[str, Any]):
  """A tool call's arguments: an object to some templates, a text to others."""

  def __init__(self, text: str, values: Mapping[str, Any]) -> None:
    super().__init__(values)
    self._text = text

  def __str__(self) -> str:
    return self._text

  def __add__(self, other: str) -> str:
    return self._text + other

  def __radd__(self, other: str) -> str:
    return other + self._text


class _Tools(list[Any]):
  """Tools in a message: a list to some templates (GLM-4), a text to others.

  The text is of functions alone, as Phi-4-mini's card has them.
  """

  def __str__(self) -> str:
    functions = [tool['function'] for tool in self]
    return json.dumps(functions, ensure_ascii=False)

  def __add__(self, other: Any) -> Any:
    return str(self) + other

  def __radd__(self, other: str) -> str:
    return other + str(self)


class Contents(enum.Enum):
  """The kind of content that a template takes in a message."""

  TEXT = 'text'
  EITHER = 'either'  # The template tests whether it is a text.
  PARTS = 'parts'


def prepared(
  messages: Sequence[Any],
  contents: Contents = Contents.TEXT,
  *,
  thinking: bool = False,
) -> list[dict[str, Any]]:
  """Returns messages whose contents are what a template takes.

  Args:
    messages: as OpenAI has them.
    contents: what the template takes; for TEXT, parts are joined, a line each.
    thinking: whether it takes what a model thought as `thinking`.

  Raises:
    UnsupportedError: a part is not text.
    InvalidRequestError: these are not such messages.
  """
  return [
    _prepared(message, f'messages[{i}]', contents, thinking)
    for i, message in enumerate(messages)
  ]


def contents_of(template: nodes.Template) -> Contents:
  """Finds what a template takes: parts, if it iterates over contents itself."""
  names = {
    assign.target.name
    for assign in template.find_all(nodes.Assign)
    if isinstance(assign.target, nodes.Name) and _is_content(assign.node)
  }
  if not any(
    _is_content(loop.iter)
    or (isinstance(loop.iter, nodes.Name) and loop.iter.name in names)
    for loop in template.find_all(nodes.For)
  ):
    return Contents.TEXT
  asks = any(
    test.name in ('string', 'iterable', 'sequence')
    for test in template.find_all(nodes.Test)
  )
  return Contents.EITHER if asks else Contents.PARTS


def has_tools(template: nodes.Template, tools: str | None) -> bool:
  """Whether a template reads tools from a message.

  Args:
    template: the template.
    tools: a variable that it reads them from, too: then only if it sets that.
  """
  places: Iterator[nodes.Node] = template.find_all(
    (nodes.Getattr, nodes.Getitem)
  )
  if tools is not None:
    places = (
      assign.node
      for assign in template.find_all(nodes.Assign)
      if isinstance(assign.target, nodes.Name) and assign.target.name == tools
    )
  return any(_is_of(node, 'tools') for node in places)


def with_tools(
  messages: Sequence[Mapping[str, Any]], tools: Sequence[Any]
) -> list[Mapping[str, Any]]:
  """Returns prepared messages with the tools in the system's, the first one."""
  messages = list(messages)
  if not messages or messages[0]['role'] != 'system':
    messages.insert(0, {'role': 'system', 'content': ''})
  messages[0] = {**messages[0], 'tools': _Tools(tools)}
  return messages


def takes_thinking(template: nodes.Template) -> bool:
  """Whether a template reads `thinking` of messages (gpt-oss)."""
  places = template.find_all((nodes.Getattr, nodes.Getitem))
  return any(_is_of(node, 'thinking') for node in places)


def _is_content(node: nodes.Node) -> bool:
  return _is_of(node, 'content')


def _is_of(node: nodes.Node, name: str) -> bool:
  if isinstance(node, nodes.Getattr):
    return node.attr == name
  return (
    isinstance(node, nodes.Getitem)
    and isinstance(node.arg, nodes.Const)
    and node.arg.value == name
  )


def _prepared(
  message: Any, where: str, contents: Contents, thinking: bool
) -> dict[str, Any]:
  if not isinstance(message, Mapping):
    raise _wrong(where, message, 'must be an object with role and content')
  role = message.get('role')
  if not isinstance(role, str) or not role:
    raise _wrong(f'{where}.role', role, 'must be a text that is not empty')
  made = {
    **message,
    'content': _content(message.get('content'), f'{where}.content', contents),
  }
  # What is beside both content and calls, such a template refuses.
  if thinking and not (message.get('content') and message.get('tool_calls')):
    thought = message.get('reasoning_content')
    if isinstance(thought, str) and thought:
      made.setdefault('thinking', thought)
  if message.get('tool_calls'):
    made['tool_calls'] = [
      _tool_call(call, f'{where}.tool_calls[{i}]')
      for i, call in enumerate(
        _a_list(message['tool_calls'], f'{where}.tool_calls', 'must be a list')
      )
    ]
  return made


def _content(content: Any, where: str, contents: Contents) -> Any:
  if content is None:
    return NoText()
  if isinstance(content, str):
    if contents is not Contents.PARTS:
      return content
    content = [content]
  texts = [
    _text_of(part, f'{where}[{i}]')
    for i, part in enumerate(
      _a_list(content, where, 'must be a text, null, or a list of parts')
    )
  ]
  if contents is not Contents.TEXT:
    return [{'type': 'text', 'text': text} for text in texts]
  return '\n'.join(texts)


def _text_of(part: Any, where: str) -> str:
  if isinstance(part, str):
    return part
  if not isinstance(part, Mapping):
    raise _wrong(where, part, 'must be a part: an object with type and text')
  kind = part.get('type', 'text')
  if not isinstance(kind, str) or kind not in _TEXTS:
    raise errors.UnsupportedError(
      f'{where}: type={errors.shown(kind)}: only parts that are text are '
      'supported.'
    )
  text = part.get(_TEXTS[kind])
  if not isinstance(text, str):
    raise _wrong(f'{where}.{_TEXTS[kind]}', text, 'must be a text')
  return text


def _tool_call(call: Any, where: str) -> Any:
  function = call.get('function') if isinstance(call, Mapping) else None
  if not isinstance(function, Mapping):
    raise _wrong(where, call, 'must be an object with a function')
  text = function.get('arguments')
  if not isinstance(text, str):  # An object already, or none.
    return call
  try:
    values = json.loads(text or '{}')
  except (ValueError, RecursionError):
    values = None
  if not isinstance(values, dict):
    raise _wrong(
      f'{where}.function.arguments', text, 'must be a JSON object, as a text'
    )
  return {
    **call,
    'function': {**function, 'arguments': _Arguments(text, values)},
  }


def _a_list(value: Any, where: str, rule: str) -> Sequence[Any]:
  if not isinstance(value, (list, tuple)):
    raise _wrong(where, value, rule)
  return value


def _wrong(where: str, value: Any, rule: str) -> errors.InvalidRequestError:
  return errors.InvalidRequestError(f'{where}={errors.shown(value)}: {rule}.')
