# SPDX-License-Identifier: Apache-2.0
"""OpenAI's HTTP, our own: what is asked, and what is answered."""

from __future__ import annotations

import json
from typing import Any
from unittest import mock

import openai
import pytest

from sarathi_jax import types
from tests import sampling_fields
from tests.server import fake
from tests.server import http_client
from tests.server.http_client import BODIES
from tests.server.http_client import CHAT
from tests.server.http_client import PROMPT
from tests.server.http_client import Client
from tests.server.http_client import text_of


@pytest.mark.parametrize('kind', BODIES)
def test_whole_and_streamed(client: Client, kind: str) -> None:
  path, body = BODIES[kind]
  status, headers, text = client.ask('POST', path, body)
  whole = json.loads(text)
  (choice,) = whole['choices']
  assert status == 200 and headers['content-type'] == 'application/json'
  assert (
    text_of(choice) == http_client.TEXT and choice['finish_reason'] == 'length'
  )
  usage = {
    'prompt_tokens': 2,
    'completion_tokens': 4,
    'total_tokens': 6,
    # One, where the same was asked before.
    'prompt_tokens_details': {'cached_tokens': mock.ANY},
  }
  assert whole['usage'] == usage and whole['model'] == 'counting'

  for with_usage in (False, True):
    events = client.events(
      path, {**body, 'stream_options': {'include_usage': with_usage}}
    )
    if with_usage:
      last = events.pop()
      assert last['choices'] == [] and last['usage'] == usage
      assert all(event['usage'] is None for event in events)
    else:
      assert not any('usage' in event for event in events)
    choices = [event['choices'][0] for event in events]
    assert ''.join(map(text_of, choices)) == http_client.TEXT
    assert [c['finish_reason'] for c in choices[:-1]] == [None] * (
      len(choices) - 1
    )
    assert choices[-1]['finish_reason'] == 'length'
    assert len({event['id'] for event in events}) == 1
    assert {event['object'] for event in events} == {
      'text_completion' if kind == 'text' else 'chat.completion.chunk'
    }
    if kind == 'chat':
      assert [c['delta'].get('role') for c in choices] == ['assistant'] + (
        [None] * (len(choices) - 1)
      )


@pytest.mark.parametrize(
  'prompt, texts',
  [
    ('t1 t2', [http_client.TEXT]),
    ([1, 2], [http_client.TEXT]),
    (['t1 t2', 't7'], [http_client.TEXT, ' t8 t9 t10 t11']),
    ([[1, 2], [7]], [http_client.TEXT, ' t8 t9 t10 t11']),
    (['t1 t2'] * 20, [http_client.TEXT] * 20),
  ],
)
def test_prompts(client: Client, prompt: Any, texts: list[str]) -> None:
  body = {**PROMPT, 'prompt': prompt}
  status, whole = client.json('/v1/completions', body)
  assert status == 200
  assert [c['index'] for c in whole['choices']] == list(range(len(texts)))
  assert [c['text'] for c in whole['choices']] == texts
  assert whole['usage']['completion_tokens'] == 4 * len(texts)
  streamed = [''] * len(texts)
  for event in client.events('/v1/completions', body):
    for choice in event['choices']:
      streamed[choice['index']] += choice['text']
  assert streamed == texts


@pytest.mark.parametrize('prompt', ['t1 t2', [1, 2]])
def test_echo(client: Client, prompt: Any) -> None:
  body = {**PROMPT, 'prompt': prompt, 'echo': True}
  _, whole = client.json('/v1/completions', body)
  assert whole['choices'][0]['text'] == 't1 t2' + http_client.TEXT
  events = client.events('/v1/completions', body)
  assert (
    ''.join(e['choices'][0]['text'] for e in events)
    == 't1 t2' + http_client.TEXT
  )


def test_token_ids(client: Client) -> None:
  """As vLLM's `return_token_ids`: for trainers."""
  asked = {'return_token_ids': True}
  for path, body in BODIES.values():
    _, whole = client.json(path, {**body, **asked})
    (choice,) = whole['choices']
    assert choice['token_ids'] == [3, 4, 5, 6]
    at = choice if 'text' in choice else whole
    assert at['prompt_token_ids'] == [1, 2]
    first, *more = client.events(path, {**body, **asked})
    at = first['choices'][0] if 'text' in choice else first
    assert at['prompt_token_ids'] == [1, 2]
    ids = [e['choices'][0]['token_ids'] for e in (first, *more)]
    assert [i for some in ids for i in some] == [3, 4, 5, 6]


def test_log_probabilities(stepped: Any) -> None:
  _, runner, client = stepped()
  sampled = runner.fetch
  runner.open()
  runner.fetch = lambda pending: sampled(pending)._replace(
    logprobs=[(-0.5 * token,) for (token,) in pending.tokens]
  )
  path, body = BODIES['chat']
  asked = {**body, 'logprobs': True, 'top_logprobs': 0}
  _, whole = client.json(path, asked)
  told = whole['choices'][0]['logprobs']['content']
  assert [t['logprob'] for t in told] == [-1.5, -2.0, -2.5, -3.0]
  assert [bytes(t['bytes']).decode() for t in told] == ['t3', 't4', 't5', 't6']
  events = client.events(path, asked)
  assert told == [
    t for e in events for t in e['choices'][0]['logprobs']['content']
  ]
  path, body = BODIES['text']
  asked = {**body, 'logprobs': 0}
  _, whole = client.json(path, asked)
  told = whole['choices'][0]['logprobs']
  assert told['token_logprobs'] == [-1.5, -2.0, -2.5, -3.0]
  assert told['tokens'] == ['t3', 't4', 't5', 't6']
  assert told['text_offset'] == [0, 2, 4, 6]
  events = client.events(path, asked)
  assert told['tokens'] == [
    t for e in events for t in e['choices'][0]['logprobs']['tokens']
  ]


def test_sampling_reaches_the_engine(stepped: Any) -> None:
  running, runner, client = stepped()
  got: list[types.Request] = []
  add = running.engine.add
  running.engine.add = lambda request: (got.append(request), add(request))
  runner.open()
  # As JSON has them.
  asked = json.loads(json.dumps(sampling_fields.EXAMPLES))
  del asked['max_tokens'], asked['logprobs']
  body = {
    **asked,
    'priority': 3,
    'tier': 'batch',
    'user': 'ann',
    'max_completion_tokens': 5,
  }
  chat_body = {**CHAT, **body}
  del chat_body['max_tokens']
  assert (
    client.json('/v1/chat/completions', chat_body)[0] == 200
    and client.json(
      '/v1/completions', {'prompt': 't1', 'seed': 2**63 - 1, 'user': ''}
    )[0]
    == 200
    and client.json(
      '/v1/chat/completions',
      {'messages': CHAT['messages']},
      **{'x-client-id': 'eve', 'x-request-id': 'mine'},
    )[0]
    == 200
  )
  first, second, third = got
  wanted = types.SamplingParams(**sampling_fields.EXAMPLES)
  for name in asked:
    assert getattr(first.sampling, name) == getattr(wanted, name), name
  assert first.sampling.max_tokens == 5
  assert (first.priority, first.tier) == (3, 'batch')
  assert first.tenant == 'ipv4:127.0.0.1'
  assert first.client == 'ipv4:127.0.0.1/ann'
  assert (second.sampling.max_tokens, second.sampling.seed) == (16, 2**63 - 1)
  assert second.client == second.tenant
  assert third.sampling.max_tokens is None  # all that there is room for
  assert third.client == 'ipv4:127.0.0.1/eve' and third.request_id == 'mine'


def test_models_and_health(ours: tuple[fake.RunningServer, Client]) -> None:
  running, client = ours
  _, _, text = client.ask('GET', '/v1/models')
  (model,) = json.loads(text)['data']
  assert (model['id'], model['max_model_len']) == ('counting', 128)
  assert json.loads(client.ask('GET', '/v1/models/counting')[2]) == model
  status, _, text = client.ask('GET', '/v1/models/other')
  assert status == 404 and json.loads(text)['error']['code'] == (
    'model_not_found'
  )
  assert client.ask('GET', '/health')[0] == 200
  for _, body in BODIES.values():
    assert client.refused('/v1/completions', {**body, 'model': 'x'})[0] in (
      400,
      404,
    )
  assert client.refused('/v1/completions', {**PROMPT, 'model': 'x'}) == (
    404,
    "model='x': is not served here; 'counting' is.",
    'model',
  )
  assert running.is_alive()


def test_tokenize_and_detokenize(client: Client) -> None:
  path = '/tokenize'
  assert client.json(path, {'prompt': 't1 t2', 'return_token_strs': True}) == (
    200,
    {
      'count': 2,
      'max_model_len': 128,
      'tokens': [1, 2],
      'token_strs': ['t1', 't2'],
    },
  )
  _, told = client.json(path, {'messages': CHAT['messages']})
  assert told['tokens'] == [1, 2]
  long = ' '.join(['t1'] * 200)  # it can't be served, but it can be counted
  assert client.json(path, {'prompt': long})[1]['count'] == 200
  assert client.json('/detokenize', {'tokens': [3, 4]}) == (
    200,
    {'prompt': 't3 t4'},
  )
  for path, body, name in (
    ('/tokenize', {}, 'prompt'),
    ('/tokenize', {'prompt': 't1', 'odd': 1}, 'odd'),
    ('/tokenize', {'prompt': ''}, 'prompt'),
    ('/tokenize', {'prompt': [1]}, 'prompt'),
    ('/tokenize', {'prompt': 't1', 'messages': []}, 'prompt'),
    ('/tokenize', {'messages': ['x']}, 'messages'),
    ('/tokenize', {'prompt': 'a' * 70_000}, 'prompt'),
    ('/detokenize', {}, 'tokens'),
    ('/detokenize', {'tokens': 'x'}, 'tokens'),
    ('/detokenize', {'tokens': [64]}, 'tokens'),
    ('/detokenize', {'tokens': [-1]}, 'tokens'),
    ('/detokenize', {'tokens': [True]}, 'tokens'),
    ('/detokenize', {'tokens': [10**30]}, 'tokens'),
  ):
    status, message, _ = client.refused(path, body)
    assert status == 400 and message.startswith(name), (path, body, message)


def test_openais_client(client: Client) -> None:
  with openai.OpenAI(
    base_url=f'http://127.0.0.1:{client.port}/v1',
    api_key='none',
    max_retries=0,
    timeout=fake.TIMEOUT_S,
  ) as ours:
    assert ours.models.list().data[0].id == 'counting'
    chat_body: Any = {**CHAT, 'logprobs': True}
    whole = ours.chat.completions.create(**chat_body)
    assert whole.choices[0].message.content == http_client.TEXT
    assert whole.choices[0].logprobs is not None
    assert whole.usage is not None and whole.usage.completion_tokens == 4
    answer = whole.choices[0].message.model_dump()
    chat_body['messages'] = [*CHAT['messages'], answer]  # type: ignore
    assert ours.chat.completions.create(**chat_body).usage.prompt_tokens == 6
    events = list(
      ours.chat.completions.create(
        **chat_body, stream=True, stream_options={'include_usage': True}
      )
    )
    assert events[-1].usage.completion_tokens == 4
    assert ours.completions.create(**PROMPT).choices[0].text == http_client.TEXT
    with pytest.raises(openai.BadRequestError) as caught:
      ours.completions.create(**{**PROMPT, 'temperature': -1})
    assert caught.value.param == 'temperature'
    with pytest.raises(openai.NotFoundError):
      ours.completions.create(**{**PROMPT, 'model': 'x'})


def test_nothing_is_left(ours: tuple[fake.RunningServer, Client]) -> None:
  running, _ = ours
  running.assert_nothing_is_left()


def _formats() -> dict[str, dict[str, Any]]:
  """Each way to ask for outputs of t3, t5 and t7 alone."""
  regex = '(t3|t5|t7)+t9'
  tags = {
    'type': 'structural_tag',
    'format': {'type': 'regex', 'pattern': regex},
  }
  return {
    'regex': {'structured_outputs': {'regex': regex}},
    'choice': {'structured_outputs': {'choice': ['t3t5t7t9', 't1']}},
    'grammar': {
      'structured_outputs': {'grammar': 'start: ("t3" | "t5" | "t7")+ "t9"'}
    },
    'tags': {'response_format': tags},
  }


@pytest.mark.parametrize('kind', BODIES)
def test_outputs_that_follow_a_grammar(
  ours: tuple[fake.RunningServer, Client], kind: str
) -> None:
  path, body = BODIES[kind]
  for name, asked in _formats().items():
    whole = {**body, **asked, 'max_tokens': 9, 'ignore_eos': True}
    status, told = ours[1].json(path, whole)
    assert status == 200, (name, told)
    choice = told['choices'][0]
    assert text_of(choice).split() == ['t3', 't5', 't7', 't9'], name
    assert choice['finish_reason'] == 'stop'


@pytest.mark.parametrize('kind', BODIES)
def test_a_response_format_that_is_none(
  ours: tuple[fake.RunningServer, Client], kind: str
) -> None:
  path, body = BODIES[kind]
  schema = {'name': 'a', 'schema': {'type': 'object'}}
  for said, says in (
    ('json_object', 'must be an object'),
    ({}, 'response_format.type=None'),
    ({'type': 'xml'}, 'must be one of text, json_object'),
    ({'type': 'text', 'x': 1}, 'response_format.x'),
    ({'type': 'json_schema'}, 'response_format.json_schema=None'),
    ({'type': 'json_schema', 'json_schema': {'name': 'a'}}, 'schema.schema'),
    (
      {'type': 'json_schema', 'json_schema': {**schema, 'name': 'ä b'}},
      'json_schema.name',
    ),
    (
      {'type': 'json_schema', 'json_schema': {**schema, 'strict': 1}},
      'json_schema.strict',
    ),
    (
      {'type': 'json_schema', 'json_schema': {**schema, 'odd': 1}},
      'json_schema.odd',
    ),
    (
      {
        'type': 'json_schema',
        'json_schema': {**schema, 'schema': {'type': 'strin'}},
      },
      'Invalid type: strin',
    ),
    # No token of this model writes a brace.
    ({'type': 'json_object'}, 'no token of this model'),
  ):
    status, message, param = ours[1].refused(
      path, {**body, 'response_format': said}
    )
    assert (status, param) == (400, 'response_format'), (said, message)
    assert says in message
  status, told = ours[1].json(
    path, {**body, 'response_format': {'type': 'text'}}
  )
  assert status == 200, told
  both = {'response_format': {'type': 'json_object'}}
  status, message, _ = ours[1].refused(
    path, {**body, **both, 'structured_outputs': {'regex': 't1'}}
  )
  assert status == 400 and 'excludes structured_outputs' in message
  status, message, _ = ours[1].refused(path, {**body, 'guided_regex': 't1'})
  assert status == 400 and 'structured_outputs.regex' in message
