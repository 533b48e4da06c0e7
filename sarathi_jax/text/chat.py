# SPDX-License-Identifier: Apache-2.0
"""Lays out chats by a checkpoint's own template, as transformers would.

They are rendered here with jinja2: importing transformers would take seconds,
for which the first chat would wait.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import datetime
import json
import pathlib
from typing import Any, NoReturn

import jinja2
from jinja2 import ext
from jinja2 import sandbox

from sarathi_jax import errors
from sarathi_jax.text import messages as messages_lib


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


class ChatTemplate:
  """A chat template.

  Args:
    source: the template's text, of jinja2.
    special_tokens: texts that it may name, such as bos_token.

  Raises:
    CheckpointError: it is not a template.
  """

  def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
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
    try:
      self._template = environment.from_string(source)
      self._contents = messages_lib.contents_of(environment.parse(source))
    except jinja2.TemplateError as error:
      raise errors.CheckpointError(
        f"chat template: can't be read: {error}"
      ) from error

  @classmethod
  def from_folder(cls, folder: pathlib.Path) -> ChatTemplate | None:
    """Returns the template of a checkpoint; None if it has none."""
    config = tokenizer_config(folder)
    source = _source(folder, config)
    if not source:
      return None
    tokens = {
      name: text_of(value)
      for name, value in config.items()
      if name.endswith('_token')
    }
    return cls(
      source, {name: text for name, text in tokens.items() if text is not None}
    )

  def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
    """Returns the text of a chat, up to where the assistant's answer begins.

    Args:
      messages: as OpenAI has them; see `messages.prepared`.

    Raises:
      InvalidRequestError: they are not such messages, or the template refuses
        them.
    """
    prepared = messages_lib.prepared(messages, self._contents)
    try:
      return self._template.render(
        messages=prepared,
        add_generation_prompt=True,
        tools=None,
        documents=None,
        **self._special_tokens,
      )
    except Exception as error:  # A template may raise anything.
      raise errors.InvalidRequestError(
        f'messages: the chat template refused them: {errors.cut(str(error))}'
      ) from error


def tokenizer_config(folder: pathlib.Path) -> dict[str, Any]:
  """Reads tokenizer_config.json, and merges special_tokens_map.json into it.

  Does as transformers does: a file that lists added_tokens_decoder is new
  enough to say everything by itself.

  Raises:
    CheckpointError: one of them is not JSON.
  """
  config = read_json(folder / 'tokenizer_config.json')
  if config.get('added_tokens_decoder') is None:
    config |= read_json(folder / 'special_tokens_map.json')
  return config


def text_of(token: Any) -> str | None:
  """Returns the text of a token; None if it has none.

  Args:
    token: its JSON value in those files: a text, or an object with content.
  """
  text = token.get('content') if isinstance(token, dict) else token
  return text if isinstance(text, str) else None


def _source(folder: pathlib.Path, config: Mapping[str, Any]) -> str | None:
  """Returns the template's text, of the file that has it; None if none has."""
  file = folder / 'chat_template.jinja'
  if file.is_file():
    try:
      return file.read_text(encoding='utf-8')
    except ValueError as error:
      raise errors.CheckpointError(f"{file}: can't be read: {error}") from error
  source = config.get('chat_template') or read_json(
    folder / 'chat_template.json'
  ).get('chat_template')
  try:
    if isinstance(source, list):  # Several, by name.
      source = {entry['name']: entry['template'] for entry in source}
    if isinstance(source, Mapping):
      source = source.get('default')
    if not isinstance(source, str | None):
      raise TypeError(f'is a {type(source).__name__}')
  except (KeyError, TypeError) as error:
    raise errors.CheckpointError(
      f'{folder}: chat_template: must be a text, a list of objects with name '
      f'and template, or an object of texts by name: {error}'
    ) from error
  return source


def read_json(file: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON object; returns {} without a file, or an object in it.

  Raises:
    CheckpointError: it is not JSON.
  """
  if not file.is_file():
    return {}
  try:
    fields = json.loads(file.read_text(encoding='utf-8'))
  except ValueError as error:
    raise errors.CheckpointError(f'{file}: not JSON: {error}') from error
  return fields if isinstance(fields, dict) else {}
