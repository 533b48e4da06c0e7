# SPDX-License-Identifier: Apache-2.0
"""Makes formats of structural tags; see `grammar.structural_tags`."""

from __future__ import annotations

from typing import Any

Format = dict[str, Any]


def sequence(*parts: Format) -> Format:
  """One after the other."""
  return {'type': 'sequence', 'elements': [*parts]}


def one_of(*parts: Format) -> Format:
  """Any of these."""
  return {'type': 'or', 'elements': [*parts]}


def text(value: str) -> Format:
  """This text."""
  return {'type': 'const_string', 'value': value}


def regex(pattern: str) -> Format:
  """What a regular expression matches."""
  return {'type': 'regex', 'pattern': pattern}


def json(schema: Any) -> Format:
  """JSON of a schema."""
  return {'type': 'json_schema', 'json_schema': schema}


def until(end: str) -> Format:
  """Any text up to some, and that."""
  return tag('', {'type': 'any_text'}, end)


def tag(begin: str, content: Format, end: str) -> Format:
  """Something between two texts."""
  return {'type': 'tag', 'begin': begin, 'content': content, 'end': end}


def separated(parts: list[Format], separator: str, **more: bool) -> Format:
  """Tags, and a text between each two."""
  return {
    'type': 'tags_with_separator',
    'tags': parts,
    'separator': separator,
    **more,
  }
