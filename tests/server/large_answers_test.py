# SPDX-License-Identifier: Apache-2.0
"""Answers that small bodies make large are bounded, or made beside the loop."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import functools
import pathlib
import threading
from typing import Any
from unittest import mock

import pytest

from sarathi_jax import errors
from sarathi_jax.server import open_inference_pb2 as oip
from sarathi_jax.server import open_inference_pb2_grpc as oip_grpc
from sarathi_jax.server import prompts
from sarathi_jax.server.guard import limits as limits_lib
from sarathi_jax.server.http import exchange
from sarathi_jax.server.protocols import messages
from sarathi_jax.text import chats
from tests.server import fake
from tests.server import http_client

_LIMITS = limits_lib.Limits(max_echoed_chars=1000)
_TEXT = '/v1/completions'
_CHAT = '/v1/chat/completions'


@pytest.fixture(scope='module')
def served(
  chat_folder: pathlib.Path,
) -> Iterator[tuple[fake.RunningServer, http_client.Client]]:
  make = functools.partial(
    fake.make_engine,
    tokenizer_folder=chat_folder,
    max_model_len=2**12,
    num_pages=2**12,
  )
  with contextlib.closing(
    fake.RunningServer(make, http_port=0, limits=_LIMITS)
  ) as running:
    yield running, http_client.Client.of(running)


@pytest.fixture
def client(
  served: tuple[fake.RunningServer, http_client.Client],
) -> Iterator[http_client.Client]:
  yield served[1]
  served[0].assert_nothing_is_left()


class _Encoding:
  """Many token ids, which nobody may list."""

  def __len__(self) -> int:
    return 10**6


@pytest.mark.parametrize(
  ('path', 'body'),
  [
    (_TEXT, {'prompt': 't1'}),
    (_CHAT, {'messages': [{'role': 'user', 'content': 't1'}]}),
    ('/tokenize', {'prompt': 't1', 'return_token_strs': True}),
    ('/tokenize', {'messages': [{'role': 'user', 'content': 't1'}]}),
  ],
)
def test_too_many_ids_are_not_listed(
  served: tuple[fake.RunningServer, http_client.Client],
  path: str,
  body: dict[str, Any],
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  """A text of 2 MB may have 8 million, which takes 0.2 s of all threads."""
  running, client = served
  inner = mock.Mock()
  inner.encode_batch_fast.return_value = [_Encoding()]
  monkeypatch.setattr(running.engine.tokenizer, '_tokenizer', inner)
  status, says, _ = client.refused(path, body)
  assert status == 400 and says.startswith('prompt: ')
  assert '1000000 tokens' in says or '1,000,000 tokens' in says
  assert 'max_model_len=4096' in says


def test_tokens_are_written_where_others_go_on(
  client: http_client.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
  """In one call, those of 1 MB kept all threads for 0.2 s."""
  sizes = []
  encode = exchange.encode

  def spy(content: Any, size: int = 0) -> bytes:
    sizes.append(size)
    return encode(content, size)

  monkeypatch.setattr(exchange, 'encode', spy)
  body = {'prompt': 't1 ' * 1000, 'return_token_strs': True}
  status, _, text = client.ask('POST', '/tokenize', body)
  assert status == 200 and max(sizes) > 0.5 * len(text)


def test_texts_of_tokens_are_bounded(
  served: tuple[fake.RunningServer, http_client.Client],
  client: http_client.Client,
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  """A token may be a hundred spaces."""
  tokenizer: Any = served[0].engine.tokenizer
  monkeypatch.setattr(tokenizer, 'decode', lambda *_, **__: ' ' * 10**6)
  status, says, _ = client.refused('/detokenize', {'tokens': [1] * 10})
  assert status == 400 and 'has 1,000,000 characters' in says


def _called(arguments: Any) -> dict[str, Any]:
  call = {'type': 'function', 'function': {'name': 'f', 'arguments': arguments}}
  return {
    'messages': [
      {'role': 'user', 'content': 't1'},
      {'role': 'assistant', 'content': None, 'tool_calls': [call]},
    ],
    'max_tokens': 1,
    'temperature': 0,
  }


_MANY = 70_000


@pytest.mark.parametrize('path', [_CHAT, '/tokenize'])
@pytest.mark.parametrize(
  'arguments',
  [
    '{"a":[' + '[],' * _MANY + '1]}',
    '{"a":[' + '{},' * _MANY + '1]}',
    '{"a":[' + '0,' * _MANY + '1]}',
    '{"a":[' + '"",' * _MANY + '1]}',
    {'a': [0] * _MANY},
  ],
)
def test_arguments_of_many_parts_are_not_read(
  chat_folder: pathlib.Path, arguments: Any, path: str
) -> None:
  """2 MB of them kept all threads for 0.2 s: to the body they are one text."""
  make = functools.partial(
    fake.make_engine,
    tokenizer_folder=chat_folder,
    max_model_len=2**16,
    num_pages=2**14,
  )
  with contextlib.closing(fake.RunningServer(make, http_port=0)) as running:
    client = http_client.Client.of(running)
    body = _called(arguments)
    if path == '/tokenize':
      body = {'messages': body['messages']}
    status, says, field = client.refused(path, body)
    assert status == 400 and says.startswith('messages[1].tool_calls')
    assert 'max_fields=65536' in says and field == 'messages'


def test_arguments_are_read(client: http_client.Client) -> None:
  for arguments in ('{"a": [1, {"b": "[[[[,,,"}]}', {'a': [1, 2.5, None]}, ''):
    assert client.json(_CHAT, _called(arguments))[0] == 200


@pytest.mark.parametrize('key', ['a', 'x' * 50])
def test_all_of_a_chat_counts(key: str) -> None:
  """Numbers and keys were free: a template writes them all the same."""
  parts = {f'{key}{i}': 1.25 for i in range(1000)}
  least = sum(map(len, parts)) + 4 * len(parts)
  message = {'role': 'tool', 'content': 'x', 'tool_calls': [parts]}
  assert prompts.num_chars([message]) == least + len('toolx')
  limits = limits_lib.Limits(max_tool_chars=least - 1)
  for name in ('tools', 'chat_template_kwargs'):
    function = {'name': 'f', 'parameters': parts}
    tool = {'type': 'function', 'function': function}
    value: Any = [tool] if name == 'tools' else parts
    chat = chats.Chat(messages=[message], **{name: value})
    with pytest.raises(errors.InvalidRequestError, match='max_tool_chars'):
      prompts.check_size(chat, limits, 2**20)


_IDS = {'prompt': [5] * 50, 'return_token_ids': True}
_ECHO = {'prompt': 't1 ' * 100, 'echo': True}


@pytest.mark.parametrize('stream', [False, True])
@pytest.mark.parametrize(
  ('more', 'n', 'num'),
  [
    (_IDS, 3, 1200),
    (_IDS | {'prompt': [[5] * 50] * 3}, 1, 1200),
    (_IDS | {'prompt': [[5] * 25] * 3}, 2, 1200),
    (_ECHO, 4, 1200),
    (_ECHO | {'return_token_ids': True}, 1, 1100),
    ({'prompt': [5] * 334, 'echo': True}, 1, 1002),
  ],
)
def test_prompts_are_told_within_a_bound(
  client: http_client.Client,
  more: dict[str, Any],
  n: int,
  num: int,
  stream: bool,
) -> None:
  """Eight of 131,000 ids, 128 times each: gigabytes of a body of 5 MB."""
  body = {'max_tokens': 1, 'temperature': 1, 'stream': stream, **more}
  status, says, field = client.refused(_TEXT, {**body, 'n': n})
  assert (status, field) == (400, 'prompt')
  assert 'characters of prompts in a response' in says
  assert 'max_echoed_chars=1000' in says
  fewer: Any = body['prompt']
  fewer = fewer[:1] if isinstance(fewer[0], list) else fewer[:40]
  status, _, text = client.ask('POST', _TEXT, {**body, 'prompt': fewer})
  assert status == 200, text


def test_what_a_chat_tells_once_counts_once(client: http_client.Client) -> None:
  body = {
    'messages': [{'role': 'user', 'content': 't1 ' * 100}],
    'max_tokens': 1,
    'temperature': 1,
    'return_token_ids': True,
  }
  assert client.json(_CHAT, {**body, 'n': 4})[0] == 200
  body['messages'] *= 2
  assert client.refused(_CHAT, body)[0] == 400


def _inferred(
  running: fake.RunningServer, n: int, text: str
) -> tuple[list[bytes], str]:
  """The texts of the first answers of each output, and an error."""
  request = oip.ModelInferRequest(model_name='counting')
  request.inputs.add(
    name='text_input',
    datatype='BYTES',
    shape=[1],
    contents=oip.InferTensorContents(bytes_contents=[text.encode()]),
  )
  for name, value in (('n', n), ('max_tokens', 1)):
    request.parameters[name].int64_param = value
  request.parameters['temperature'].double_param = 1.0
  request.parameters['exclude_input_in_output'].bool_param = False
  stub = oip_grpc.GRPCInferenceServiceStub(running.channel)
  texts, error = [], ''
  for answer in stub.ModelStreamInfer(iter([request]), timeout=fake.TIMEOUT_S):
    error = error or answer.error_message
    texts += answer.infer_response.raw_output_contents[:1]
  return texts, error


def test_so_does_open_inference(
  served: tuple[fake.RunningServer, http_client.Client],
) -> None:
  texts, error = _inferred(served[0], 3, 't1 ' * 100)
  assert len(texts) == 3 and not error
  assert all(text.startswith(b't1 ' * 100, 4) for text in texts)
  texts, error = _inferred(served[0], 4, 't1 ' * 100)
  assert not texts
  assert 'exclude_input_in_output: has 1,200 characters of prompts' in error


@pytest.mark.parametrize(
  'more', [{'prompt': [5] * 120, 'return_token_ids': True}, {'echo': True}]
)
def test_long_events_are_not_made_on_the_event_loop(
  served: tuple[fake.RunningServer, http_client.Client],
  client: http_client.Client,
  more: dict[str, Any],
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  """131,000 ids held it for 10 ms, 128 times."""
  made: dict[str, int] = {}
  encode = exchange.encode

  def spy(content: Any, size: int = 0) -> bytes:
    data = encode(content, size)
    name = threading.current_thread().name
    made[name] = max(made.get(name, 0), len(data))
    return data

  monkeypatch.setattr(exchange, 'encode', spy)
  monkeypatch.setattr(messages, '_INLINE', 100)
  body = {'prompt': 't1 ' * 300, 'max_tokens': 2, 'temperature': 0, **more}
  assert client.events(_TEXT, body)
  loop = served[0]._thread.name
  assert max(made.values()) > 400 and made.pop(loop, 0) < 400, made
