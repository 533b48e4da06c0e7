# SPDX-License-Identifier: Apache-2.0
"""OpenAI's HTTP, our own: each field is honoured, or refused by its name."""

from __future__ import annotations

import contextlib
import http.client
import json
from typing import Any

import pytest

from sarathi_jax import sampling_params
from sarathi_jax.server.http import chat
from sarathi_jax.server.http import completions
from sarathi_jax.server.http import fields
from tests import sampling_fields
from tests.server import conformance_test
from tests.server import http_client
from tests.server.http_client import BODIES
from tests.server.http_client import PROMPT
from tests.server.http_client import Client
from tests.server.http_client import text_of

_ODD: dict[str, Any] = {'none of these': 1}  # of no field's kind
_NEUTRAL = {
  '/v1/completions': {**fields.NOT_DONE, **completions.NEUTRAL},
  '/v1/chat/completions': {**fields.NOT_DONE, **chat.NEUTRAL},
}


@pytest.mark.parametrize('kind', BODIES)
def test_each_field_is_honoured_or_refused_by_name(
  client: Client, kind: str
) -> None:
  path, body = BODIES[kind]
  own = completions.FIELDS if kind == 'text' else chat.FIELDS
  for name in (
    *fields.OWN,
    *own,
    *_NEUTRAL[path],
    *sampling_params.FIELDS,
    *sampling_params.UNSUPPORTED,
    'odd',
    'guided_json',
    '',
  ):
    status, message, param = client.refused(path, {**body, name: _ODD})
    assert status == 400, name
    # A new name for a field of the engine's is told by that.
    assert message.startswith((name, 'max_tokens')), (name, message)
    assert param == (name or None), name


@pytest.mark.parametrize('kind', BODIES)
def test_what_is_so_anyway_may_be_said(client: Client, kind: str) -> None:
  path, body = BODIES[kind]
  own = completions.FIELDS if kind == 'text' else chat.FIELDS
  said = {
    name: value
    for name, values in _NEUTRAL[path].items()
    for value in values[:1]
  }
  assert said['metadata'] == {}
  nothing = dict.fromkeys(
    {*fields.OWN, *own, *_NEUTRAL[path], *sampling_params.UNSUPPORTED}
    - {'messages', 'prompt'}
  )
  for more in (said, nothing, {'stop': None, 'seed': None, 'top_p': None}):
    status, told = client.json(path, {**body, **more})
    assert status == 200, told
    assert text_of(told['choices'][0]) == http_client.TEXT


def test_stream_options_that_say_what_is_so_anyway(client: Client) -> None:
  for kind, (path, body) in BODIES.items():
    options = {
      'include_usage': False,
      'include_obfuscation': False,
      'continuous_usage_stats': False,
    }
    assert client.events(path, {**body, 'stream_options': options}), kind
    for name in ('include_obfuscation', 'continuous_usage_stats'):
      status, message, _ = client.refused(
        path, {**body, 'stream': True, 'stream_options': {name: True}}
      )
      assert status == 400, message
      assert message.startswith(f'stream_options.{name}=True'), message
      assert 'not supported' in message


def test_what_other_fields_are_refused(client: Client) -> None:
  for kind, body, name in (
    ('text', {'prompt': None}, 'prompt'),
    ('text', {'prompt': []}, 'prompt'),
    ('text', {'prompt': ''}, 'prompt'),
    ('text', {'prompt': [[]]}, 'prompt'),
    ('text', {'prompt': [1, 't1']}, 'prompt'),
    ('text', {'prompt': [True]}, 'prompt'),
    ('text', {'prompt': [1.5]}, 'prompt'),
    ('text', {'prompt': [[1], []]}, 'prompt'),
    ('text', {'prompt': ['t1'] * 1025}, 'prompt'),
    ('text', {'suffix': 'x'}, 'suffix'),
    ('text', {'logprobs': 21}, 'logprobs'),
    ('text', {'max_tokens': 0}, 'max_tokens'),
    ('text', {'max_tokens': False, 'echo': True}, 'max_tokens'),
    ('text', {'n': True}, 'n'),
    ('text', {'stream_options': {'include_usage': True}}, 'stream_options'),
    ('text', {'stream': 1}, 'stream'),
    ('text', {'stream': True, 'stream_options': {'x': 1}}, 'stream_options'),
    ('text', {'max_completion_tokens': 3}, 'max_completion_tokens'),
    ('text', {'user': 'u' * 300}, 'user'),
    ('chat', {'messages': None}, 'messages'),
    ('chat', {'messages': []}, 'messages'),
    ('chat', {'messages': 'x'}, 'messages'),
    ('chat', {'messages': [None]}, 'messages'),
    ('chat', {'messages': [{}]}, 'messages'),
    ('chat', {'messages': [{'role': 'user', 'odd': 1}]}, 'messages'),
    ('chat', {'messages': [{'role': 'user', 'content': 1}]}, 'messages'),
    (
      'chat',
      {
        'messages': [
          {
            'role': 'user',
            'content': [{'type': 'text', 'text': 't1', 'cache_control': 1}],
          }
        ]
      },
      'messages',
    ),
    ('chat', {'top_logprobs': 0}, 'top_logprobs'),
    ('chat', {'logprobs': True, 'top_logprobs': 21}, 'top_logprobs'),
    ('chat', {'logprobs': True, 'top_logprobs': True}, 'top_logprobs'),
    ('chat', {'logprobs': 1}, 'logprobs'),
    ('chat', {'tools': [{'type': 'function'}]}, 'tools'),
    ('chat', {'tool_choice': 'required'}, 'tool_choice'),
  ):
    path, good = BODIES[kind]
    status, message, _ = client.refused(path, {**good, **body})
    assert status == 400 and message.startswith(name), (body, message)


@pytest.mark.parametrize('ids, sampling, says', conformance_test.BAD)
def test_a_bad_request(
  client: Client, ids: list[int], sampling: dict[str, Any], says: str
) -> None:
  body = json.dumps({**PROMPT, 'prompt': ids, **sampling})
  connection = http.client.HTTPConnection('127.0.0.1', client.port)
  with contextlib.closing(connection):
    connection.request('POST', '/v1/completions', body)
    reply = connection.getresponse()
    told = json.loads(reply.read())['error']
  assert reply.status == 400
  if 'not JSON' not in told['message']:  # not a number, infinity
    assert says in told['message'] or not ids
    assert told['param'] == next(iter(sampling), 'prompt')


@pytest.mark.parametrize('kind', BODIES)
def test_values_that_a_field_does_not_take(client: Client, kind: str) -> None:
  path, body = BODIES[kind]
  for name, value, rule in sampling_fields.BAD:
    data = json.dumps(value)
    if data == 'null' or 'NaN' in data or 'Infinity' in data:
      continue  # which says nothing, or is not JSON
    if (kind, name) == ('chat', 'logprobs'):
      continue  # which is a flag there
    status, message, param = client.refused(path, {**body, name: value})
    assert (status, param) == (400, name) and rule in message, message


@pytest.mark.parametrize('kind', BODIES)
def test_fields_that_the_engine_does_not_honour(
  client: Client, kind: str
) -> None:
  path, body = BODIES[kind]
  for name, value in sampling_fields.NOT_SUPPORTED:
    status, message, param = client.refused(path, {**body, name: value})
    assert (status, param) == (400, name) and 'supported' in message, message
