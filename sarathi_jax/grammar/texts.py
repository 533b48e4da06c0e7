# SPDX-License-Identifier: Apache-2.0
"""Writes what an output has to be as a grammar that llguidance reads."""

from __future__ import annotations

from collections.abc import Mapping
import decimal
import json
import math
import re
from typing import Any

import llguidance
from llguidance import gbnf_to_lark

from sarathi_jax import errors
from sarathi_jax import structured_outputs
from sarathi_jax.grammar import structural_tags

# Of all in a grammar, with a common power of ten taken out: llguidance takes
# memory and time for each number below, 4 GB and 100 s for ten million.
_MOST_MULTIPLE, _MOST_DIGITS = 10_000, 20
_MULTIPLE = re.compile(r'"multipleOf"\s*:\s*([-+.0-9eE]{1,40})')
_ESCAPE = re.compile(r'\\u([0-9a-fA-F]{4})')
# What Rust's regular expressions give a meaning; `re.escape` has more.
_META = re.compile(r'[\\.+*?()|\[\]{}^$#&\-~/]')


def text_of(
  outputs: structured_outputs.StructuredOutputsParams,
  special: Mapping[int, str],
) -> str:
  """Returns the text of a grammar; whether it is sound, llguidance tells.

  Args:
    outputs: what it is to be of.
    special: the texts of the model's special tokens, by id.

  Raises:
    InvalidRequestError: it can't be written.
  """
  _check_multiples(outputs)
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
      return llguidance.LLMatcher.grammar_from_regex(outputs.regex)
    case 'choice':
      assert outputs.choice is not None
      # A regular expression, as a rule of many texts takes ten times as long.
      return llguidance.LLMatcher.grammar_from_regex(
        '|'.join(_META.sub(r'\\\g<0>', text) for text in outputs.choice)
      )
    case 'grammar':
      assert outputs.grammar is not None
      return llguidance.LLMatcher.grammar_from_lark(_lark(outputs))
  assert outputs.structural_tag is not None
  writer = structural_tags.Writer(special)
  return llguidance.LLMatcher.grammar_from_lark(
    writer.write(json.loads(outputs.structural_tag))
  )


def _check_multiples(
  outputs: structured_outputs.StructuredOutputsParams,
) -> None:
  """Refuses numbers of which outputs must be multiples that are too large."""
  said = str(getattr(outputs, outputs.kind))
  said = _ESCAPE.sub(lambda match: chr(int(match[1], 16)), said)
  found = [decimal.Decimal(text) for text in _MULTIPLE.findall(said)]
  if not found:
    return
  exponent = min(
    int(number.normalize().as_tuple().exponent) for number in found
  )
  is_small = exponent > -_MOST_DIGITS and all(
    abs(number) < _MOST_MULTIPLE for number in found
  )
  scaled = (
    [int(number.scaleb(-exponent)) for number in found] if is_small else []
  )
  if not is_small or abs(math.lcm(*scaled)) > _MOST_MULTIPLE:
    raise errors.InvalidRequestError(
      f'{outputs.shown(outputs.kind)}: multipleOf is too large; the '
      'least common multiple of all, without a power of ten, must be at most '
      f'{_MOST_MULTIPLE}.'
    )


def _of_schema(
  schema: dict[str, Any], outputs: structured_outputs.StructuredOutputsParams
) -> str:
  options: Any = {'whitespace_flexible': not outputs.disable_any_whitespace}
  if outputs.whitespace_pattern is not None:
    options['whitespace_pattern'] = outputs.whitespace_pattern
  return llguidance.LLMatcher.grammar_from_json_schema(schema, defaults=options)


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
