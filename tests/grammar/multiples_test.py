# SPDX-License-Identifier: Apache-2.0
"""Multiples: large ones of schemas are refused, however they are written."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from sarathi_jax import errors
from sarathi_jax import types
from tests.grammar import walks

Params = types.StructuredOutputsParams
_LARGE = {'type': 'integer', 'multipleOf': 1_000_003}


def _tag(schema: Any) -> dict[str, Any]:
  return {
    'structures': [{'begin': '<a>', 'schema': schema, 'end': '</a>'}],
    'triggers': ['<a>'],
  }


def _format(schema: Any) -> dict[str, Any]:
  return {'format': {'type': 'json_schema', 'json_schema': schema}}


@pytest.mark.parametrize(
  'said',
  [
    {'json': _LARGE | {'multipleOf': 10**7}},
    {'json': json.dumps(_LARGE)},
    {'json': {'type': 'number', 'multipleOf': 0.12345678}},
    {'json': {'type': 'number', 'multipleOf': 1e-30}},
    {'json': {'allOf': [{'multipleOf': 997}, {'multipleOf': 991}]}},
    {'json': {'properties': {'const': _LARGE}}},
    {'json': {'properties': {'properties': {'items': _LARGE}}}},
    {'json': {'const': _LARGE, '$ref': '#/const'}},
    {'json': {'items': {'$ref': '#/enum/0'}, 'enum': [_LARGE]}},
    {'json': {'$defs': {'x': _LARGE}, '$ref': '#/$defs/x'}},
    {'json': {'x': {'enum': [_LARGE]}, '$ref': '#/x/enum/0'}},
    {'structural_tag': _tag(_LARGE)},
    {'structural_tag': _tag(json.dumps(_LARGE))},
    {'structural_tag': json.dumps(_tag(json.dumps(_LARGE)))},
    {'structural_tag': _tag(json.dumps(_LARGE).replace('O', '\\u004f'))},
    {'structural_tag': _format(_LARGE)},
    {'structural_tag': {'format': {'type': 'or', 'elements': [
      {'type': 'const_string', 'value': '%json 1'}, _format(_LARGE)['format'],
    ]}}},
    {'grammar': 'start: %json {"type": "integer", "multipleOf": 1e9}'},
    {'grammar': 'start: "%json" %json\n {"multiple\\u004ff": 1000003}'},
    {'grammar': 'start: x\nx: %json{"a": {"multipleOf": 1000003}, "a": 1}'},
    {'grammar': 'start: %json {"multipleOf": 1000003, "multipleOf": 1}'},
    {'grammar': f'start: %json {{"multipleOf": 0.{"0" * 60}1000003e67}}'},
    {'grammar': f'start: %json {{"multipleOf": 1000003, "a": {"9" * 5000}}}'},
    {'grammar': 'start: %json {"multipleOf": 1e99999999999999999999}'},
    {'grammar': 'start: %lark {\nstart: %json {"multipleOf": 1000003}\n}'},
  ],
)  # fmt: skip
def test_large_multiples_are_refused(said: dict[str, Any]) -> None:
  """llguidance takes gigabytes for some of these."""
  with pytest.raises(errors.InvalidRequestError, match='multipleOf is too'):
    walks.grammars().compile(Params(**said))


@pytest.mark.parametrize(
  'said',
  [
    {'regex': r'\{"multipleOf": -?\d+\}'},
    {'regex': r'%json \{"multipleOf": 1000003}'},
    {'choice': ['"multipleOf": --', '{"multipleOf": 20000}']},
    {'choice': ['%json {"multipleOf": 20000}']},
    {'grammar': 'start: /"multipleOf": e/'},
    {'grammar': r'start: "\"multipleOf\": 20000" %json {"multipleOf": 2}'},
    {'json': {'const': {'multipleOf': 20000}}},
    {'json': {'enum': [{'multipleOf': 20000}, '"multipleOf": 20000']}},
    {'json': {'properties': {'multipleOf': {'type': 'integer'}}}},
    {'json': {'title': '"multipleOf": 20000', 'type': 'null'}},
    {'structural_tag': _format({'const': {'multipleOf': 20000}})},
    {'structural_tag': {'format': {
      'type': 'const_string', 'value': '%json {"multipleOf": 20000}'}}},
  ],
)  # fmt: skip
def test_what_only_looks_like_one_is_none(said: dict[str, Any]) -> None:
  walks.grammars().compile(Params(**said))


@pytest.mark.parametrize('multiple', [3, 0.01, 1000, 2.5])
def test_multiples(multiple: float) -> None:
  schema = {'type': 'number', 'multipleOf': multiple, 'minimum': 0}
  outputs = Params(json=schema | {'maximum': 9000})
  rng = random.Random(9)
  for _ in range(10):
    tokens, is_over = walks.walk(walks.grammars(), outputs, rng)
    value = float(walks.text_of('bytes', tokens)) / multiple
    assert not is_over or abs(value - round(value)) < 1e-6
