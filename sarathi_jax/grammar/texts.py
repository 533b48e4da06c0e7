# SPDX-License-Identifier: Apache-2.0
"""Writes what an output has to be as a grammar that llguidance reads."""

from __future__ import annotations

from collections.abc import Mapping
import json
import re
from typing import Any

import llguidance
from llguidance import gbnf_to_lark

from sarathi_jax import errors
from sarathi_jax import structured_outputs
from sarathi_jax.grammar import multiples
from sarathi_jax.grammar import structural_tags

# Has each mask of a long constant take microseconds, where it took 5 ms to find
# all the tokens of its rest: outputs have it in any tokens that spell it. After
# all else, as the last word counts.
END = '\n%llguidance {"no_forcing": true}'
_ANSWER = 'answer'  # the name of a grammar within another
# What Rust's regular expressions give a meaning; `re.escape` has more.
_META = re.compile(r'[\\.+*?()|\[\]{}^$#&\-~/]')
_OPTIONS = 'x-guidance'  # of a schema, in llguidance's own words


def text_of(
  outputs: structured_outputs.StructuredOutputsParams,
  added: Mapping[int, str],
) -> str:
  """Returns a grammar as llguidance reads it, which tells whether it is sound.

  Args:
    outputs: what it is to be of.
    added: the texts of the model's added tokens, by id.

  Raises:
    InvalidRequestError: it can't be written.
  """
  parts = [_lark_of(outputs, added)]
  if isinstance(outputs, structured_outputs.ReplyParams) and outputs.answer:
    text_of(outputs.answer, added)  # By itself, so that errors name it.
    parts.append(_lark_of(outputs.answer, added))
  if not multiples.are_small('\n'.join(parts)):
    raise errors.InvalidRequestError(
      f'{outputs.shown(outputs.kind)}: multipleOf is too large; the '
      'least common multiple of all, without a power of ten, must be at most '
      f'{multiples.MOST}.'
    )
  around, *inner = (part + END for part in parts)
  if not inner:
    return llguidance.LLMatcher.grammar_from_lark(around)
  grammars = [
    {'lark_grammar': around},
    *({'lark_grammar': part, 'name': _ANSWER} for part in inner),
  ]
  return json.dumps({'grammars': grammars})


def _lark_of(
  outputs: structured_outputs.StructuredOutputsParams,
  added: Mapping[int, str],
) -> str:
  match outputs.kind:
    case 'json':
      assert outputs.json is not None
      schema = json.loads(outputs.json)
      if outputs.disable_additional_properties:
        _close(schema)
      return _of_schema(schema, outputs)
    case 'json_object':
      return _of_schema({'type': 'object'}, outputs)
    case 'regex':
      assert outputs.regex is not None
      return f'start: {structural_tags.of_regex(outputs.regex)}'
    case 'choice':
      assert outputs.choice is not None
      # A regular expression, as a rule of many texts takes ten times as long.
      any_of = '|'.join(_META.sub(r'\\\g<0>', t) for t in outputs.choice)
      return f'start: {structural_tags.of_regex(any_of)}'
    case 'grammar':
      return _lark(outputs)
  assert outputs.structural_tag is not None
  is_reply = isinstance(outputs, structured_outputs.ReplyParams)
  writer = structural_tags.Writer(added, _ANSWER if is_reply else '')
  return writer.write(json.loads(outputs.structural_tag))


def _of_schema(
  schema: dict[str, Any], outputs: structured_outputs.StructuredOutputsParams
) -> str:
  options: Any = {'whitespace_flexible': not outputs.disable_any_whitespace}
  if outputs.whitespace_pattern is not None:
    options['whitespace_pattern'] = outputs.whitespace_pattern
  said = schema.get(_OPTIONS, {})
  if isinstance(said, dict):  # else llguidance refuses it
    schema[_OPTIONS] = {**options, **said}
  return f'start: {structural_tags.of_schema(schema)}'


def _close(schema: Any) -> None:
  """Has objects of a schema no properties but those it names."""
  parts = [schema]
  while parts:
    part = parts.pop()
    if isinstance(part, list):
      parts.extend(part)
    elif isinstance(part, dict):
      if part.get('type') == 'object' or 'properties' in part:
        part.setdefault('additionalProperties', False)
      parts.extend(part.values())


def _lark(outputs: structured_outputs.StructuredOutputsParams) -> str:
  """Returns a grammar in Lark's syntax, of Lark's or GBNF's."""
  grammar = outputs.grammar
  assert grammar is not None
  if '::=' not in grammar:
    return grammar
  try:
    return gbnf_to_lark.gbnf_to_lark(grammar)
  except Exception as error:  # Its own, or RecursionError.
    raise errors.InvalidRequestError(
      f'{outputs.shown("grammar")}: {errors.cut(str(error))}'
    ) from error
