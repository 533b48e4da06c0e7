# SPDX-License-Identifier: Apache-2.0
"""Fields of OpenAI's HTTP: refused, dropped by smg, or its own."""

from __future__ import annotations

from collections.abc import Iterator
import json
import re
from typing import Any

import pytest

from tests import source_tree
from tests.server import behind_smg
from tests.server import fake
from tests.server import http_client
from tests.server.http_client import BODIES
from tests.server.http_client import PROMPT
from tests.server.http_client import Client
from tests.server.http_client import text_of

# What becomes of the fields of a body, chat and text: 400, a part of our
# message, or nothing: then README names it.
REFUSED: dict[str, tuple[Any, str]] = {
  'n': (2, 'chat text'),
  'regex': ('a+', 'chat text'),
  'ebnf': ('root ::= "a"', 'chat text'),
  'json_schema': ('{}', 'text'),
  'response_format': ({'type': 'json_object'}, 'chat'),
  'modalities': (['audio'], 'chat'),
  'seed': (2**31, 'chat text'),
}
DROPPED: dict[str, tuple[Any, str]] = {
  'best_of': (3, 'chat text'),
  'logit_bias': ({'5': 1}, 'chat text'),
  'min_tokens': (3, 'chat'),
  'response_format': ({'type': 'json_object'}, 'text'),
  'json_schema': ('{}', 'chat'),
  'guided_json': ({}, 'chat text'),
  'guided_regex': ('a+', 'chat text'),
  'guided_choice': (['a'], 'chat text'),
  'guided_grammar': ('x', 'chat text'),
  'structured_outputs': ({'regex': 'a'}, 'chat text'),
  'allowed_token_ids': ([5], 'chat text'),
  'bad_words': (['a'], 'chat text'),
  'use_beam_search': (True, 'chat text'),
  'length_penalty': (2.0, 'chat text'),
  'prompt_logprobs': (1, 'chat text'),
  'truncate_prompt_tokens': (1, 'chat text'),
  'add_special_tokens': (False, 'chat text'),
  'include_stop_str_in_output': (True, 'chat text'),
  'priority': (5, 'chat text'),
  'logprobs': (2, 'text'),
  'max_completion_tokens': (2, 'text'),
}


@pytest.fixture(scope='module')
def served(
  tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[fake.RunningServer, Client]]:
  folder = http_client.write_tokenizer(tmp_path_factory.mktemp('tokenizer'))
  with behind_smg.serve(folder) as both:
    yield both


@pytest.mark.parametrize('name', REFUSED)
def test_what_is_refused(
  served: tuple[fake.RunningServer, Client], name: str
) -> None:
  value, kinds = REFUSED[name]
  for kind in kinds.split():
    path, body = BODIES[kind]
    status, _, text = served[1].ask('POST', path, {**body, name: value})
    assert status == 400, (kind, status, text)
    words = {
      'ebnf': 'grammar',
      'response_format': 'json_schema',
      'modalities': 'modality',
    }
    assert words.get(name, name) in text


def _readme_names() -> set[str]:
  text = (source_tree.ROOT / 'README.md').read_text()
  dropped = re.search(r'smg drops, without a word:(.*?)\n\n', text, re.S)
  assert dropped is not None
  return set(re.findall(r'`([a-z_]+)`', dropped[1]))


def test_what_smg_drops_is_named(
  served: tuple[fake.RunningServer, Client],
) -> None:
  """If one of these is no longer dropped, README has to say so."""
  _, client = served
  for name, (value, kinds) in DROPPED.items():
    for kind in kinds.split():
      path, body = BODIES[kind]
      status, _, text = client.ask('POST', path, {**body, name: value})
      assert status == 200, (name, kind, status, text)
      choice = json.loads(text)['choices'][0]
      assert (choice.get('text') or choice['message']['content']) == (
        't3 t4 t5 t6'
      ), name
      assert not choice.get('logprobs')
  assert set(DROPPED) == _readme_names()


@pytest.mark.parametrize('kind', BODIES)
def test_several_outputs_come_through_smg(
  served: tuple[fake.RunningServer, Client], kind: str
) -> None:
  path, body = BODIES[kind]
  body = {**body, 'n': 2, 'temperature': 1}
  status, whole = served[1].json(path, body)
  assert status == 200, whole
  assert [c['index'] for c in whole['choices']] == [0, 1]
  assert [text_of(c) for c in whole['choices']] == ['t3 t4 t5 t6'] * 2
  assert whole['usage']['prompt_tokens'] == 2
  assert whole['usage']['completion_tokens'] == 8
  texts = ['', '']
  for event in served[1].events(path, body):
    for choice in event['choices']:
      texts[choice['index']] += text_of(choice) or ''
  assert texts == ['t3 t4 t5 t6'] * 2


@pytest.mark.parametrize(
  'fields, text',
  [({'echo': True}, 't1 t2t3 t4 t5 t6'), ({'suffix': ' x'}, 't3 t4 t5 t6 x')],
)
def test_what_smg_adds_itself(
  served: tuple[fake.RunningServer, Client], fields: dict[str, Any], text: str
) -> None:
  _, _, body = served[1].ask('POST', '/v1/completions', PROMPT | fields)
  assert json.loads(body)['choices'][0]['text'] == text


@pytest.mark.parametrize(
  'seed, status',
  [
    (0, 200),
    (2**31 - 2, 200),
    (2**31 - 1, 400),
    (2**63 - 1, 400),
    (-1, 200),
    (-(2**31) + 1, 200),
    (-(2**31), 400),
    (-(2**40), 400),
  ],
)
def test_seeds_that_smg_makes_one_are_refused(
  served: tuple[fake.RunningServer, Client], seed: int, status: int
) -> None:
  got, _, text = served[1].ask(
    'POST', '/v1/completions', {**PROMPT, 'seed': seed}
  )
  assert got == status, text
  assert status == 200 or 'seed=' in text
