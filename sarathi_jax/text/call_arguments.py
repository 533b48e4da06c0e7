# SPDX-License-Identifier: Apache-2.0
"""Says what the arguments of a call have to be, in each way to write them.

A way is a function of the arguments' JSON schema that returns a format of
structural tags.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import itertools
import re
from typing import Any

from sarathi_jax import errors
from sarathi_jax.text import tags

Schema = Mapping[str, Any]
# What a schema may say of an object whose keys are written one by one.
_SAID = {'type', 'properties', 'required', 'additionalProperties'}
_DEFINITIONS = ('$defs', 'definitions')
_NOTES = {'title', 'description', 'default', 'examples', '$schema', '$comment'}
_LENGTHS = {'minLength', 'maxLength'}
_TEXT_SAID = {'type', 'enum', 'const', *_LENGTHS, *_NOTES, *_DEFINITIONS}


def as_json(schema: Schema) -> tags.Format:
  """{"city": "Paris", "days": 2}."""
  return tags.json(schema)


def as_python(schema: Schema) -> tags.Format:
  """city="Paris", days=2: values are JSON."""
  return _keys(
    schema,
    lambda name, value: tags.sequence(tags.text(f'{name}='), tags.json(value)),
    tags.sequence(tags.regex(r'[A-Za-z_][A-Za-z0-9_]*='), tags.json({})),
    ', ',
  )


def as_elements(schema: Schema) -> tags.Format:
  """Elements, a line each, whose texts are as they are and the rest JSON.

  <parameter=city>
  Paris
  </parameter>
  """
  return _elements(schema, '<parameter=', '>\n', '\n</parameter>\n')


def as_pairs(schema: Schema) -> tags.Format:
  """Elements of keys and of values; texts are as they are, the rest JSON.

  <arg_key>city</arg_key>
  <arg_value>Paris</arg_value>
  """
  return _elements(
    schema, '<arg_key>', '</arg_key>\n<arg_value>', '</arg_value>\n'
  )


def _elements(
  schema: Schema, before: str, between: str, end: str
) -> tags.Format:
  """Returns elements: a key after `before`, its value after `between`."""
  return _keys(
    schema,
    lambda name, value: tags.sequence(
      tags.text(f'{before}{name}{between}'),
      _text_element(name, value, end)
      if is_text(value)
      else tags.sequence(tags.json(value), tags.text(end)),
    ),
    tags.sequence(
      tags.regex(rf'{before}[^<>\n]+{re.escape(between)}'), tags.until(end)
    ),
    '',
  )


def is_text(schema: Any) -> bool:
  """Whether a schema is of texts alone, or of texts and null."""
  return 'string' in (some := kinds(schema)) and some <= {'string', 'null'}


def kinds(schema: Any) -> set[str]:
  """Returns the types of what a schema is of; '' for any, or unknown ones."""
  if not isinstance(schema, Mapping):
    return {''}
  if 'anyOf' in schema:
    return set().union(*map(kinds, schema['anyOf']))
  if 'const' in schema or 'enum' in schema:
    values = [schema['const']] if 'const' in schema else schema['enum']
    return {'string' if isinstance(value, str) else '' for value in values}
  kind = schema.get('type', '')
  return {kind} if isinstance(kind, str) else {*kind}


def _keys(
  schema: Schema,
  item: Callable[[str, Any], tags.Format],
  any_item: tags.Format,
  separator: str,
) -> tags.Format:
  """Returns keys with their values, those that are required first."""
  properties = schema.get('properties') or {}
  unknown = sorted({*schema} - _SAID - {*_DEFINITIONS} - _NOTES)
  if unknown:
    raise errors.UnsupportedError(
      f'tools: parameters has {errors.shown(unknown[0])}, to which a call can '
      'not be held as this model writes its arguments.'
    )
  if not properties and schema.get('additionalProperties', True) is not False:
    return tags.separated([tags.tag('', any_item, '')], separator)
  shared = {name: schema[name] for name in _DEFINITIONS if name in schema}
  must = list(schema.get('required', ()))
  items = {
    name: item(name, _with(shared, properties.get(name, {})))
    for name in dict.fromkeys([*must, *properties])
  }
  some = [items[name] for name in items if name not in must]
  if must or not separator:
    parts = [[tags.text(separator), items[name]] for name in must]
    needed = list(itertools.chain(*parts))[1:]
    return tags.sequence(tags.text(''), *needed, *_maybe(separator, some))
  return tags.one_of(
    tags.text(''),
    *(
      tags.sequence(first, *_maybe(separator, some[i + 1 :]))
      for i, first in enumerate(some)
    ),
  )


def _maybe(separator: str, items: list[tags.Format]) -> list[tags.Format]:
  return [
    tags.one_of(tags.sequence(tags.text(separator), item), tags.text(''))
    for item in items
  ]


def _with(shared: Schema, schema: Any) -> Any:
  """Returns a schema that finds what it refers to."""
  return {**shared, **schema} if isinstance(schema, Mapping) else schema


def _text_element(name: str, schema: Schema, end: str) -> tags.Format:
  """Returns a text as it is, and the element's end."""
  said = {**schema, **next(filter(is_text, schema.get('anyOf', ())), {})}
  said.pop('anyOf', None)
  unknown = sorted({*said} - _TEXT_SAID)
  if unknown:
    raise errors.UnsupportedError(
      f'tools: parameters.properties.{name} has {errors.shown(unknown[0])}, to '
      'which a text can not be held as this model writes it.'
    )
  values = [said['const']] if 'const' in said else said.get('enum')
  if values is not None:
    return tags.sequence(
      tags.one_of(*map(tags.text, map(str, values))), tags.text(end)
    )
  if not _LENGTHS & {*said}:
    return tags.until(end)
  # One line, or its end could be a part of it.
  least, most = said.get('minLength', 0), said.get('maxLength', '')
  return tags.regex(rf'[^\n{end[0]}]{{{least},{most}}}{re.escape(end)}')
