# SPDX-License-Identifier: Apache-2.0
"""Refuses schemas whose outputs are multiples of numbers that are too large."""

from __future__ import annotations

from collections.abc import Iterator
import decimal
import json
import math
import re
from typing import Any

# Of all in a grammar, with a common power of ten taken out: llguidance takes
# memory and time for each number below, 4 GB and 100 s for ten million.
MOST = 10_000
_MOST_DIGITS = 20
# Objects as pairs, so that no name said twice hides a value. No float is so
# large, or so precise, that it could pass where what was written may not.
_DECODER = json.JSONDecoder(
  object_pairs_hook=tuple, parse_int=float, parse_float=float
)
_SCHEMA = re.compile(r'%json[ \t\r\n]*')  # What may come between, no comment.
_DATA = frozenset({'const', 'enum'})
_BY_NAME = frozenset(
  {'$defs', 'definitions', 'patternProperties', 'properties'}
)


def are_small(grammar: str) -> bool:
  """Whether all multiples in the schemas of a grammar are small enough.

  Args:
    grammar: in Lark's syntax, where JSON of a schema follows each `%json`.
  """
  found: list[float] = []
  for match in _SCHEMA.finditer(grammar):
    try:
      schema, _ = _DECODER.raw_decode(grammar, match.end())
    except (ValueError, RecursionError):
      continue  # As llguidance says, or it is within a text.
    found += _multiples_of(schema)
  if not all(abs(number) < MOST for number in found):
    return False
  numbers = [decimal.Decimal(str(number)).normalize() for number in found]
  exponent = min((int(n.as_tuple().exponent) for n in numbers), default=0)
  return (
    exponent > -_MOST_DIGITS
    and math.lcm(*(int(number.scaleb(-exponent)) for number in numbers)) <= MOST
  )


def _multiples_of(schema: Any) -> Iterator[float]:
  """Yields the numbers of a schema's `multipleOf`s, wherever they are.

  Those in what is only compared are of no schema, unless one refers to it.
  """
  parts: list[Any] = [schema]
  data: list[Any] = []
  refers = False
  while parts:
    part = parts.pop()
    if isinstance(part, list):
      parts.extend(part)
    for key, value in part if isinstance(part, tuple) else ():
      refers |= key == '$ref'
      if key == 'multipleOf' and isinstance(value, float):
        yield value
      elif key in _BY_NAME and isinstance(value, tuple):
        parts.extend(schema for _, schema in value)
      else:
        (data if key in _DATA else parts).append(value)
    if not parts and refers:
      parts, data = data, []
