# SPDX-License-Identifier: Apache-2.0
"""OpenAI's batch files, in and out."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import functools
import json
import pathlib
import re
from typing import Any

from openai.types import chat as openai_chat
from openai.types import completion as openai_completion
import pytest

from sarathi_jax import offline
from sarathi_jax import result_lines
from sarathi_jax.engine import engine as engine_lib
from sarathi_jax.launch import loading
from tests.offline import runs
from tests.server import fake
from tests.server import http_client

CHAT, TEXT = '/v1/chat/completions', '/v1/completions'
MESSAGES = [{'role': 'user', 'content': 't1 t2'}]


def batch_line(
  custom_id: Any = 'a', url: Any = TEXT, body: Any = None, **more: Any
) -> dict[str, Any]:
  return {
    'custom_id': custom_id,
    'method': 'POST',
    'url': url,
    'body': {'prompt': [5, 6]} if body is None else body,
    **more,
  }


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  return http_client.write_tokenizer(tmp_path_factory.mktemp('tokenizer'))


@pytest.fixture(scope='module')
def served(folder: pathlib.Path) -> Iterator[http_client.Client]:
  with contextlib.closing(
    fake.RunningServer(
      functools.partial(fake.make_engine, tokenizer_folder=folder), http_port=0
    )
  ) as running:
    yield http_client.Client.of(running)


@pytest.fixture
def engine(folder: pathlib.Path) -> engine_lib.Engine:
  return fake.make_engine(tokenizer_folder=folder)


def results_of(
  engine: engine_lib.Engine, *lines: Any, **defaults: Any
) -> list[dict[str, Any]]:
  """The results of lines, in their order, as they are read back."""
  texts = [
    line if isinstance(line, bytes) else json.dumps(line).encode()
    for line in lines
  ]
  parsed = (
    offline.parse_line(i, text, defaults, 0, engine)
    for i, text in enumerate(texts, 1)
  )
  unwritten = offline.unwritten(parsed, result_lines.Written(set(), set()))
  results = list(offline.run_lines(engine, unwritten))
  found: list[dict[str, Any]] = json.loads(json.dumps(results))
  return sorted(
    found,
    key=lambda r: int(
      re.sub('[^0-9]', '', str(r.get('id', r.get('request_id'))))
    ),
  )


def without_names(body: dict[str, Any]) -> dict[str, Any]:
  """Leaves out what is another's each time: names, what was in the cache."""
  kept = {k: v for k, v in body.items() if k not in ('id', 'created')}
  if usage := kept.get('usage'):
    kept['usage'] = usage | {'prompt_tokens_details': None}
  return kept


BODIES: tuple[tuple[str, dict[str, Any]], ...] = (
  (TEXT, {'prompt': 't1 t2'}),
  (TEXT, {'prompt': [1, 2], 'model': 'counting', 'max_tokens': 3}),
  (TEXT, {'prompt': ['t1', 't7 t8'], 'echo': True, 'user': 'ann'}),
  (TEXT, {'prompt': [[1, 2]] * 9, 'priority': 3, 'tier': 'batch'}),
  (TEXT, {'prompt': [1, 2], 'echo': True, 'return_token_ids': True}),
  (TEXT, {'prompt': 't1', 'logprobs': 0, 'stream': False}),
  (TEXT, {'prompt': 't1', 'stop': ['t5'], 'seed': 2**63 - 1}),
  (TEXT, {'prompt': ['t1', 't7'], 'echo': True, 'n': 2}),
  (CHAT, {'messages': MESSAGES, 'max_completion_tokens': 2}),
  (CHAT, {'messages': MESSAGES}),
  (CHAT, {'messages': MESSAGES, 'logprobs': True, 'return_token_ids': True}),
  # Refused, in the same words.
  (TEXT, {'prompt': 't1', 'odd': 1}),
  (TEXT, {'prompt': ''}),
  (TEXT, {}),
  (TEXT, {'prompt': [1, 200]}),
  (TEXT, {'prompt': 't1', 'model': 'other'}),
  (TEXT, {'prompt': 't1', 'best_of': 2}),
  (CHAT, {'messages': []}),
  (CHAT, {'messages': [{'role': 'user', 'content': 3}]}),
  (CHAT, {'messages': MESSAGES, 'temperature': -1}),
)


def test_bodies_are_answered_as_over_http(
  engine: engine_lib.Engine, served: http_client.Client
) -> None:
  results = results_of(
    engine,
    *(batch_line(f'c{i}', url, body) for i, (url, body) in enumerate(BODIES)),
  )
  for i, ((url, body), result) in enumerate(zip(BODIES, results, strict=True)):
    status, told = served.json(url, body, **{'x-request-id': f'c{i}'})
    response = result.pop('response')
    assert result == {
      'id': f'batch_req_{i + 1}',
      'custom_id': f'c{i}',
      'error': None,
    }
    assert response.keys() == {'status_code', 'request_id', 'body'}
    got = response['body']
    assert response['status_code'] == status, (body, got)
    assert without_names(got) == without_names(told)
    if status == 200:
      theirs: Any = (
        openai_chat.ChatCompletion
        if url == CHAT
        else openai_completion.Completion
      )
      assert theirs.model_validate(got).id == got['id']
  assert {r['custom_id'] for r in results} == {
    f'c{i}' for i in range(len(BODIES))
  }


BAD: tuple[tuple[Any, str], ...] = (
  (batch_line(custom_id=3), 'custom_id=3: must be a text'),
  (batch_line(custom_id=''), "custom_id='': must be a text"),
  ({'body': {}}, 'custom_id=None: must be a text'),
  (batch_line(method='GET'), "method='GET': must be 'POST'"),
  (batch_line(url='/v1/embeddings'), "url='/v1/embeddings': must be one of"),
  (batch_line(url=[1]), 'url=[1]: must be one of'),
  (batch_line(body=[1]), 'body=[1]: must be an object'),
  (batch_line(odd=1), 'odd: unknown key'),
  (batch_line(body={'prompt': 't1', 'stream': True}), 'stream=True: a file'),
  (b'{"custom_id": "a", "custom_id": "b"}', 'custom_id: is there twice'),
  (b'{"body": ' + b'[' * 90 + b']' * 90 + b'}', 'custom_id=None'),
  (b'{"body": NaN}', 'body: has NaN'),
)


def test_lines_that_are_refused(engine: engine_lib.Engine) -> None:
  lines = [line for line, _ in BAD]
  results = results_of(engine, batch_line('first'), *lines, batch_line('first'))
  first, *refused, last = results
  assert first['response']['status_code'] == 200
  for result, (_, words) in zip(refused, BAD, strict=True):
    assert result['response']['status_code'] == 400
    assert words in result['response']['body']['error']['message']
  assert 'an earlier line' in last['response']['body']['error']['message']


def test_flags_are_for_what_a_body_leaves_open(
  engine: engine_lib.Engine,
) -> None:
  said = {'max_tokens': 2}
  results = results_of(
    engine,
    batch_line('a', body={'prompt': 't1'}),
    batch_line('b', CHAT, {'messages': MESSAGES}),
    batch_line('c', body={'prompt': 't1', **said}),
    batch_line('d', CHAT, {'messages': MESSAGES, **said}),
    max_tokens=3,
  )
  used = [r['response']['body']['usage']['completion_tokens'] for r in results]
  assert used == [3, 3, 2, 2]


def test_logits_that_are_not_finite(engine: engine_lib.Engine) -> None:
  runner: Any = engine._runner
  fetch = runner.fetch
  runner.fetch = lambda pending: fetch(pending)._replace(
    logprobs=[(float('nan'),) * len(t) for t in pending.tokens]
  )
  (result,) = results_of(engine, batch_line(body={'prompt': ['t1', 't2']}))
  assert result['response']['status_code'] == 500
  told = result['response']['body']['error']
  assert told['type'] == 'server_error' and 'NaN' in told['message']


def test_both_forms_in_one_file_and_resume(
  run: runs.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
  run.write(
    runs.GOOD,
    batch_line('a', body={'prompt': 'The fox', 'temperature': 0}),
    batch_line('b', body={'prompt': 'The fox', 'odd': 0}),
    b'\xef\xbb\xbf' + json.dumps(batch_line('c')).encode(),
    batch_line('c'),
    {'prompt': 'The fox', 'sampling': {'temperature': 0}},
  )
  names = []
  load = loading.load_llm

  def load_llm(*args: Any, **options: Any) -> Any:
    names.append(options['model_name'])
    return load(*args, **options)

  monkeypatch.setattr(loading, 'load_llm', load_llm)
  code, seen = run('--served_model_name=mine')
  assert code == 0 and names == ['mine']
  assert '2, see the output' in seen  # errors
  everything = run.output.read_bytes().splitlines(keepends=True)

  def named(results: list[Any]) -> dict[Any, Any]:
    return {
      (r.get('id'), r.get('request_id')): r.get('text') or r['response']['body']
      for r in results
    }

  first = named(run.results())
  assert len(first) == 6
  choice = first['batch_req_2', None]['choices'][0]
  assert choice['text'] == first[None, 'line-6'] and len(choice['text']) > 0
  assert first['batch_req_2', None]['usage']['completion_tokens'] == 5
  for kept in (0, 2, 5, 6):
    run.output.write_bytes(b''.join(everything[:kept]) + b'{"id": "batch_r')
    assert run('--resume')[0] == 0
    assert run.output.read_bytes().startswith(b''.join(everything[:kept]))
    again = named(run.results())
    assert again.keys() == first.keys() and len(run.results()) == 6
    for key, told in first.items():
      if isinstance(told, dict) and 'choices' in told:
        assert again[key]['choices'] == told['choices']
  run.output.write_text('{"custom_id": "x", "method": "POST"}\n')
  assert 'not one of our results' in run.fails('--resume')
