# SPDX-License-Identifier: Apache-2.0
"""Lays out chats by a checkpoint's own template, as transformers would.

They are rendered here with jinja2: importing transformers would take seconds,
for which the first chat would wait.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
import datetime
import json
import pathlib
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn

import jinja2
from jinja2 import ext
from jinja2 import meta
from jinja2 import sandbox

from sarathi_jax import errors
from sarathi_jax import json_file
from sarathi_jax.text import messages as messages_lib

FILE, MORE_FILES = 'chat_template.jinja', 'additional_chat_templates'
_DEFAULT, _WITH_TOOLS = 'default', 'tool_use'
_TOOLS = ('tools', 'xml_tools')  # the latter is SmolLM3's


class _Generation(ext.Extension):
  """Ignores `{% generation %}`, which marks what a model wrote."""

  tags = {'generation'}  # noqa: RUF012

  def parse(self, parser: Any) -> Any:
    next(parser.stream)
    return parser.parse_statements(('name:endgeneration',), drop_needle=True)


def _raise(message: str) -> NoReturn:
  raise jinja2.TemplateError(message)


def _to_json(value: Any, **options: Any) -> str:
  # jinja2's own filter escapes for HTML.
  return json.dumps(value, **({'ensure_ascii': False} | options))


class _Parsed(NamedTuple):
  """A template.

  Attributes:
    template: the template.
    contents: the kind of contents it takes.
    variables: those it reads.
    tools: the variable that it reads tools from, if it does.
    has_tools_in_messages: whether it has them from a message instead.
    thinking: whether it reads `thinking` of messages.
  """

  template: jinja2.Template
  contents: messages_lib.Contents
  variables: Set[str]
  tools: str | None
  has_tools_in_messages: bool
  thinking: bool

  @classmethod
  def of(cls, source: str, environment: jinja2.Environment) -> _Parsed:
    try:
      tree = environment.parse(source)
      variables = meta.find_undeclared_variables(tree)
      tools = next((name for name in _TOOLS if name in variables), None)
      return cls(
        environment.from_string(source),
        messages_lib.contents_of(tree),
        variables,
        tools,
        messages_lib.has_tools(tree, tools),
        messages_lib.takes_thinking(tree),
      )
    except Exception as error:  # Of jinja2, or of Python, which compiles it.
      raise errors.CheckpointError(
        f"chat template: can't be read: {errors.describe(error)}"
      ) from error


class ChatTemplate:
  """A chat template.

  Args:
    source: the template's text, of jinja2.
    special_tokens: texts that it may name, such as bos_token.
    with_tools: another one for chats with tools, if there is one.

  Attributes:
    words: the text of both.

  Raises:
    CheckpointError: it is not a template.
  """

  def __init__(
    self,
    source: str,
    special_tokens: Mapping[str, str],
    with_tools: str | None = None,
  ) -> None:
    environment = sandbox.ImmutableSandboxedEnvironment(
      trim_blocks=True,
      lstrip_blocks=True,
      extensions=[ext.loopcontrols, _Generation],
    )
    environment.filters['tojson'] = _to_json
    environment.tests['none'] = lambda value: (
      value is None or isinstance(value, messages_lib.NoText)
    )
    environment.globals['raise_exception'] = _raise
    environment.globals['strftime_now'] = lambda form: (
      datetime.datetime.now().strftime(form)
    )
    self._special_tokens = dict(special_tokens)
    self.words = '\n'.join(filter(None, (source, with_tools)))
    self._plain = _Parsed.of(source, environment)
    self._with_tools = (
      self._plain if with_tools is None else _Parsed.of(with_tools, environment)
    )

  @classmethod
  def from_folder(cls, folder: pathlib.Path) -> ChatTemplate | None:
    """Returns the template of a checkpoint; None if it has none."""
    config = tokenizer_config(folder)
    sources = _sources(folder, config)
    if not sources.get(_DEFAULT):
      return None
    tokens = {
      name: text_of(value)
      for name, value in config.items()
      if name.endswith('_token')
    }
    return cls(
      sources[_DEFAULT],
      {name: text for name, text in tokens.items() if text is not None},
      sources.get(_WITH_TOOLS),
    )

  @property
  def takes_tools(self) -> bool:
    """Whether chats may have tools."""
    parsed = self._with_tools
    return parsed.tools is not None or parsed.has_tools_in_messages

  def takes(self, variable: str) -> bool:
    """Whether a template reads a variable."""
    return any(
      variable in parsed.variables for parsed in (self._plain, self._with_tools)
    )

  def render(
    self,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] = (),
    variables: Mapping[str, Any] = MappingProxyType({}),
  ) -> str:
    """Returns the text of a chat, up to where the assistant's answer begins.

    Args:
      messages: as OpenAI has them; see `messages.prepared`.
      tools: that the model may call.
      variables: more of the template's variables; must be some that it takes.

    Raises:
      InvalidRequestError: they are not such messages, or the template refuses
        them.
    """
    parsed = self._with_tools if tools else self._plain
    prepared = messages_lib.prepared(
      messages, parsed.contents, thinking=parsed.thinking
    )
    ours = {
      'messages': prepared,
      'add_generation_prompt': True,
      'tools': list(tools) or None,
      'documents': None,
      **self._special_tokens,
    }
    if tools and parsed.has_tools_in_messages:
      ours['messages'] = messages_lib.with_tools(prepared, tools)
    elif tools and parsed.tools is not None:
      ours[parsed.tools] = list(tools)
    for name in variables:
      if name in ours or not self.takes(name):
        raise errors.UnsupportedError(
          f'chat_template_kwargs: has {errors.shown(name)}, which the chat '
          'template does not take from you.'
        )
    try:
      return parsed.template.render(**ours, **variables)
    except Exception as error:  # A template may raise anything.
      raise errors.InvalidRequestError(
        f'messages: the chat template refused them: {errors.cut(str(error))}'
      ) from error


def tokenizer_config(folder: pathlib.Path) -> dict[str, Any]:
  """Reads tokenizer_config.json, and merges special_tokens_map.json into it.

  Does as transformers does: a file that lists added_tokens_decoder is new
  enough to say everything by itself.

  Raises:
    CheckpointError: one of them is not a JSON object.
  """
  config = json_file.read_if_there(folder / 'tokenizer_config.json')
  if config.get('added_tokens_decoder') is None:
    config |= json_file.read_if_there(folder / 'special_tokens_map.json')
  return config


def text_of(token: Any) -> str | None:
  """Returns the text of a token; None if it has none.

  Args:
    token: its JSON value in those files: a text, or an object with content.
  """
  text = token.get('content') if isinstance(token, dict) else token
  return text if isinstance(text, str) else None


def _sources(folder: pathlib.Path, config: Mapping[str, Any]) -> dict[str, str]:
  """Returns the texts of templates by name, as transformers finds them."""
  file = folder / FILE
  if file.is_file():
    more = folder / MORE_FILES / f'{_WITH_TOOLS}.jinja'
    files = {_DEFAULT: file, **({_WITH_TOOLS: more} if more.is_file() else {})}
    return {name: _text_in(file) for name, file in files.items()}
  source = config.get('chat_template') or json_file.read_if_there(
    folder / 'chat_template.json'
  ).get('chat_template')
  try:
    if isinstance(source, list):  # Several, by name.
      source = {entry['name']: entry['template'] for entry in source}
    if not isinstance(source, Mapping):
      source = {_DEFAULT: source}
    return {
      name: _checked(source[name])
      for name in (_DEFAULT, _WITH_TOOLS)
      if source.get(name)
    }
  except (KeyError, TypeError) as error:
    raise errors.CheckpointError(
      f'{folder}: chat_template: must be a text, a list of objects with name '
      f'and template, or an object of texts by name: {error}'
    ) from error


def _checked(source: Any) -> str:
  if not isinstance(source, str):
    raise TypeError(f'is a {type(source).__name__}')
  return source


def _text_in(file: pathlib.Path) -> str:
  try:
    return file.read_text(encoding='utf-8')
  except ValueError as error:
    raise errors.CheckpointError(f"{file}: can't be read: {error}") from error
