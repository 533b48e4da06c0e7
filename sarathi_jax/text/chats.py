# SPDX-License-Identifier: Apache-2.0
"""A chat to continue: its messages, the tools, and which of them to call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import re
from typing import Any

from sarathi_jax import errors

Message = Mapping[str, Any]  # {'role': ..., 'content': ...}
AUTO, NONE, REQUIRED = 'auto', 'none', 'required'
_NAME = re.compile(r'[A-Za-z0-9_./:-]{1,256}')


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
  """A chat to continue. Names are OpenAI's.

  Attributes:
    messages: the messages; see `messages.prepared`.
    tools: what the model may call: {'type': 'function', 'function': {'name':
      ..., 'description': ..., 'parameters': SCHEMA}}. The template writes them
      into the prompt, with whatever else they have. The arguments of those
      with 'strict' are of their schema.
    tool_choice: 'auto'; 'none', by which the prompt has no tools; 'required';
      or {'type': 'function', 'function': {'name': ...}}, for that one.
    parallel_tool_calls: whether a reply may have several calls.
    chat_template_kwargs: variables of the template, such as enable_thinking.

  Raises:
    InvalidRequestError: a value is wrong.
  """

  messages: Sequence[Message]
  tools: Sequence[Mapping[str, Any]] = ()
  tool_choice: str | Mapping[str, Any] = AUTO
  parallel_tool_calls: bool = True
  chat_template_kwargs: Mapping[str, Any] = dataclasses.field(
    default_factory=dict
  )

  def __post_init__(self) -> None:
    _check(
      isinstance(self.messages, Sequence)
      and not isinstance(self.messages, (str, bytes)),
      'messages',
      self.messages,
      'a list of objects with role and content',
    )
    _check(isinstance(self.tools, (list, tuple)), 'tools', self.tools, 'a list')
    names = [_name(tool, f'tools[{i}]') for i, tool in enumerate(self.tools)]
    seen: set[str] = set()
    for i, name in enumerate(names):
      if name in seen:
        raise errors.InvalidRequestError(
          f'tools[{i}].function.name={errors.shown(name)}: an earlier one has '
          'it, too.'
        )
      seen.add(name)
    _check(
      isinstance(self.parallel_tool_calls, bool),
      'parallel_tool_calls',
      self.parallel_tool_calls,
      'true or false',
    )
    _check(
      isinstance(self.chat_template_kwargs, Mapping),
      'chat_template_kwargs',
      self.chat_template_kwargs,
      'an object',
    )
    self._check_choice(names)

  def _check_choice(self, names: Sequence[str]) -> None:
    choice = self.tool_choice
    if isinstance(choice, Mapping):
      named = self.named
      _check(
        choice.get('type') == 'function' and isinstance(named, str),
        'tool_choice',
        choice,
        "{'type': 'function', 'function': {'name': ...}}",
      )
      if named not in names:
        raise errors.InvalidRequestError(
          f'tool_choice: names {errors.shown(named)}, which is none of tools.'
        )
      return
    _check(
      choice in (AUTO, NONE, REQUIRED),
      'tool_choice',
      choice,
      f'{AUTO}, {NONE}, {REQUIRED}, or an object that names a tool',
    )
    if choice == REQUIRED and not names:
      raise errors.InvalidRequestError(
        f'tool_choice={errors.shown(choice)}: needs tools.'
      )

  @property
  def named(self) -> str | None:
    """The tool that must be called, if it is named."""
    choice = self.tool_choice
    function = choice.get('function') if isinstance(choice, Mapping) else None
    return function.get('name') if isinstance(function, Mapping) else None

  @property
  def offered(self) -> tuple[Mapping[str, Any], ...]:
    """The tools that the model is told of."""
    return () if self.tool_choice == NONE else tuple(self.tools)

  @property
  def callable(self) -> dict[str, Mapping[str, Any]]:
    """The tools that it may call, by name the schema of their arguments."""
    functions = (tool['function'] for tool in self.offered)
    return {
      function['name']: function.get('parameters') or {}
      for function in functions
      if self.named in (None, function['name'])
    }


def _name(tool: Any, where: str) -> str:
  """Returns the name of a tool, which it checks."""
  function = tool.get('function') if isinstance(tool, Mapping) else None
  if not isinstance(function, Mapping) or tool.get('type') != 'function':
    raise errors.InvalidRequestError(
      f'{where}={errors.shown(tool)}: must be an object with type="function" '
      'and function.'
    )
  name, parameters = function.get('name'), function.get('parameters')
  if not isinstance(name, str) or not _NAME.fullmatch(name):
    raise errors.InvalidRequestError(
      f'{where}.function.name={errors.shown(name)}: must be up to 256 letters '
      'of a to z, digits, _, ., /, : and -.'
    )
  _check(
    parameters is None or isinstance(parameters, Mapping),
    f'{where}.function.parameters',
    parameters,
    'a JSON schema, an object',
  )
  description, strict = function.get('description'), function.get('strict')
  _check(
    description is None or isinstance(description, str),
    f'{where}.function.description',
    description,
    'a text',
  )
  _check(
    strict is None or isinstance(strict, bool),
    f'{where}.function.strict',
    strict,
    'true or false',
  )
  return name


def _check(ok: bool, name: str, value: Any, rule: str) -> None:
  if not ok:
    raise errors.InvalidRequestError(
      f'{name}={errors.shown(value)}: must be {rule}.'
    )
