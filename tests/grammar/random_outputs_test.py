# SPDX-License-Identifier: Apache-2.0
"""A random model at a high temperature: what ends is of its grammar.

What does not end within its tokens is counted, and can be completed.
"""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
import json
import random
import re
from typing import Any

import jsonschema
import pytest

from sarathi_jax import llm as llm_lib
from sarathi_jax import types
from tests import tiny
from tests import tokenizer_fixture
from tests.grammar import walks

MAX_TOKENS = 448
_WORDS = 'the', 'über', 'a b', '', '"', '\\', '日', '0', '{}'
_TESTS = [
  pytest.param(24, 12, id='some'),
  pytest.param(500, 100, id='many', marks=pytest.mark.slow),
]


def random_schema(  # noqa: PLR0911 (a case each)
  rng: random.Random, depth: int = 3
) -> dict[str, Any]:
  """A schema whose values are bounded in size."""
  kinds = [
    'null',
    'bool',
    'int',
    'number',
    'string',
    'pattern',
    'enum',
    'const',
  ]
  if depth:
    kinds += ['array', 'tuple', 'object', 'object', 'any', 'ref']
  match rng.choice(kinds):
    case 'null':
      return {'type': 'null'}
    case 'bool':
      return {'type': 'boolean'}
    case 'int':
      low = rng.randint(-200, 200)
      return {
        'type': 'integer',
        'minimum': low,
        'maximum': low + rng.randint(0, 5000),
      }
    case 'number':
      return {'type': 'number', 'minimum': -1, 'exclusiveMaximum': 2}
    case 'string':
      low = rng.randint(0, 3)
      return {
        'type': 'string',
        'minLength': low,
        'maxLength': low + rng.randint(0, 9),
      }
    case 'pattern':
      return {'type': 'string', 'pattern': f'^{random_regex(rng, 2)}$'}
    case 'enum':
      return {'enum': rng.sample([*_WORDS, 1, -2.5, None, True], 4)}
    case 'const':
      return {
        'const': rng.choice([*_WORDS, 7, False, None, [1, 'a'], {'b': 2}])
      }
    case 'array':
      low = rng.randint(0, 2)
      return {
        'type': 'array',
        'items': random_schema(rng, depth - 1),
        'minItems': low,
        'maxItems': low + rng.randint(0, 2),
      }
    case 'tuple':
      items = [random_schema(rng, depth - 1) for _ in range(rng.randint(1, 3))]
      return {
        'type': 'array',
        'prefixItems': items,
        'items': False,
        'minItems': len(items),
      }
    case 'object':
      names = rng.sample(
        ['a', 'b', 'größe', 'x y', '"', 'ab'], rng.randint(0, 4)
      )
      return {
        'type': 'object',
        'properties': {name: random_schema(rng, depth - 1) for name in names},
        'required': [name for name in names if rng.random() < 0.6],
        'additionalProperties': False,
      }
    case 'any':
      some = [random_schema(rng, depth - 1) for _ in range(rng.randint(1, 3))]
      return {'anyOf': some}
    case _:
      name = f'd{rng.randrange(10**9)}'
      return {
        '$defs': {name: random_schema(rng, depth - 1)},
        'allOf': [{'$ref': f'#/$defs/{name}'}],
      }


def _hoisted(schema: dict[str, Any]) -> dict[str, Any]:
  """Moves all definitions to the top, where references look for them."""
  found: dict[str, Any] = {}
  parts: list[Any] = [schema]
  while parts:
    part = parts.pop()
    if isinstance(part, dict):
      defs = part.pop('$defs', {})
      found |= defs
      parts += [*part.values(), *defs.values()]
    elif isinstance(part, list):
      parts += part
  return schema | ({'$defs': found} if found else {})


def random_regex(rng: random.Random, depth: int = 3) -> str:
  """A regular expression whose matches are bounded in size."""
  atoms = ['a', 'b', 'th', '[a-f]', '[^x"\\\\]', 'ü', '[0-9]', r'\.', ' ', '日']
  if not depth or rng.random() < 0.3:
    return rng.choice(atoms)
  parts = [random_regex(rng, depth - 1) for _ in range(rng.randint(1, 3))]
  match rng.randrange(4):
    case 0:
      return f'({"|".join(parts)})'
    case 1:
      low = rng.randint(0, 2)
      return f'({"".join(parts)}){{{low},{low + rng.randint(0, 3)}}}'
    case 2:
      return f'({"".join(parts)})?'
    case _:
      return ''.join(parts)


@pytest.fixture(scope='module')
def llm() -> llm_lib.LLM:
  model = dataclasses.replace(tiny.MODEL, max_position_embeddings=512)
  with tiny.few_sizes():
    return llm_lib.LLM(
      model,
      params=tiny.make_params(),
      tokenizer=tokenizer_fixture.make(),
      eos_token_ids=(walks.EOS,),
      config=tiny.engine_config(
        token_budget=32, max_num_seqs=16, page_size=16, num_pages=200
      ),
    )


def _outputs(num_schemas: int, num_regexes: int) -> Iterator[dict[str, Any]]:
  rng = random.Random(7)
  for i in range(num_schemas):
    schema = _hoisted(random_schema(rng))
    yield {'json': schema, 'disable_any_whitespace': i % 2 == 0}
  for _ in range(num_regexes):
    yield {'regex': random_regex(rng)}


def _is_of(said: dict[str, Any], text: str) -> bool:
  if 'regex' in said:
    return re.fullmatch(said['regex'], text, re.S) is not None
  try:
    jsonschema.validate(json.loads(text), said['json'])
  except (ValueError, jsonschema.ValidationError):
    return False
  return True


@pytest.mark.parametrize('num_schemas, num_regexes', _TESTS)
def test_what_ends_is_of_its_grammar(
  llm: llm_lib.LLM, num_schemas: int, num_regexes: int
) -> None:
  asked = list(_outputs(num_schemas, num_regexes))
  done = llm.generate(
    [[65 + i % 26] for i in range(len(asked))],
    [
      types.SamplingParams(
        temperature=1.5,
        seed=i,
        max_tokens=MAX_TOKENS,
        structured_outputs=said,
      )
      for i, said in enumerate(asked)
    ],
  )
  rng = random.Random(8)
  num_unfinished = 0
  for said, one in zip(asked, done, strict=True):
    tokens = [t for t in one.token_ids if t != walks.EOS]
    if one.finish_reason is not types.FinishReason.STOP:
      assert one.finish_reason is types.FinishReason.LENGTH
      num_unfinished += 1
      outputs = types.StructuredOutputsParams(**said)
      tokens, is_over = walks.walk(
        walks.grammars(), outputs, rng, most=20_000, before=tokens
      )
      assert is_over
    text = walks.text_of('bytes', tokens)
    assert _is_of(said, text), (said, text)
  print(f'{num_unfinished} of {len(asked)} did not end')
  assert num_unfinished <= 0.2 * len(asked)
