# SPDX-License-Identifier: Apache-2.0
"""OpenAI's `response_format`: what the output has to be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import re
from typing import Any, ClassVar

from sarathi_jax import errors
from sarathi_jax import types

_NAME = re.compile(r'[a-zA-Z0-9_-]{1,64}')
_Check = tuple[Callable[[Any], bool], str]
_OBJECT: _Check = (lambda v: isinstance(v, dict), 'must be an object')
# The fields of `json_schema`: what holds for each. A schema always is, strict
# or not.
_JSON_SCHEMA: Mapping[str, _Check] = {
  'name': (
    lambda v: isinstance(v, str) and bool(_NAME.fullmatch(v)),
    'must be of 1 to 64 letters, digits, _ and -',
  ),
  'schema': _OBJECT,
  'description': (lambda v: v is None or isinstance(v, str), 'must be a text'),
  'strict': (
    lambda v: v is None or isinstance(v, bool),
    'must be true or false',
  ),
}
_NEEDED = 'name', 'schema'


class ResponseFormat(types.StructuredOutputsParams):
  """What the output has to be, as a client said it here."""

  NAMES: ClassVar[Mapping[str, str]] = {
    'json': 'response_format.json_schema.schema',
    'json_object': 'response_format',
    'structural_tag': 'response_format',
  }


def read(said: Mapping[str, Any]) -> types.StructuredOutputsParams | None:
  """Returns what a `response_format` asks for; None for any text.

  Raises:
    InvalidRequestError: it is not of OpenAI's form, or vLLM's.
  """
  match said.get('type'):
    case 'text':
      _check_known(said, ())
      return None
    case 'json_object':
      _check_known(said, ())
      return ResponseFormat(json_object=True)
    case 'json_schema':
      _check_known(said, ('json_schema',))
      return ResponseFormat(json=_schema(said.get('json_schema')))
    case 'structural_tag':  # vLLM's
      tag: Any = said
      return ResponseFormat(structural_tag=tag)
    case other:
      raise errors.InvalidRequestError(
        f'response_format.type={errors.shown(other)}: must be one of text, '
        'json_object, json_schema, structural_tag.'
      )


def _schema(said: Any) -> Any:
  _check('json_schema', said, _OBJECT)
  for name, value in said.items():
    if name not in _JSON_SCHEMA:
      raise errors.UnsupportedError(
        f'response_format.json_schema.{errors.cut(name)}='
        f'{errors.shown(value)}: this server does not know this field.'
      )
  for name, check in _JSON_SCHEMA.items():
    if name in said or name in _NEEDED:
      _check(f'json_schema.{name}', said.get(name), check)
  return said['schema']


def _check(name: str, value: Any, check: _Check) -> None:
  holds, rule = check
  if not holds(value):
    raise errors.InvalidRequestError(
      f'response_format.{name}={errors.shown(value)}: {rule}.'
    )


def _check_known(said: Mapping[str, Any], names: tuple[str, ...]) -> None:
  for name, value in said.items():
    if name not in ('type', *names):
      raise errors.UnsupportedError(
        f'response_format.{errors.cut(name)}={errors.shown(value)}: is no '
        f'field of {said["type"]}.'
      )
