# SPDX-License-Identifier: Apache-2.0
"""Bad requests get their status and message, and nothing else changes."""

from __future__ import annotations

import math
from typing import Any

import grpc
import pytest

from sarathi_jax import errors
from sarathi_jax.server import sarathi_pb2 as pb
from sarathi_jax.server.protocols import status
from tests.server import fake

IDS = {'token_ids': [1, 2]}

# fields of the request, its sampling, what the message must say
BAD: tuple[tuple[dict[str, Any], dict[str, Any], tuple[str, ...]], ...] = (
  ({}, {}, ('input', 'must be set')),
  ({'text': ''}, {}, ("prompt=''", 'empty')),
  ({'token_ids': []}, {}, ('prompt=()', 'empty')),
  ({'chat': pb.Chat()}, {}, ('prompt=[]', 'empty')),
  ({'token_ids': [1] * 128}, {}, ('128 tokens', 'max_model_len=128')),
  ({'text': 't1 ' * 5000}, {}, ('5000 tokens', 'max_model_len=128')),
  (
    {'token_ids': [1, 64]},
    {},
    ('prompt: has the unknown token id 64', '[0, 64)'),
  ),
  ({'token_ids': [-1]}, {}, ('unknown token id -1', '[0, 64)')),
  ({**IDS, 'tier': 'slow'}, {}, ("tier='slow'", 'interactive, batch')),
  (IDS, {'max_tokens': 0}, ('max_tokens=0', '>= 1')),
  (IDS, {'max_tokens': -5}, ('max_tokens=-5', '>= 1')),
  (
    IDS,
    {'max_tokens': 3, 'fill_context': True},
    ('max_tokens=3', 'fill_context'),
  ),
  (IDS, {'temperature': math.nan}, ('temperature=nan', 'finite')),
  (IDS, {'temperature': math.inf}, ('temperature=inf', 'finite')),
  (IDS, {'temperature': -1.0}, ('temperature=-1.0', '>= 0')),
  (IDS, {'top_p': 0.0}, ('top_p=0.0', '(0, 1]')),
  (IDS, {'top_p': 2.0}, ('top_p=2.0', '(0, 1]')),
  (IDS, {'top_k': -2}, ('top_k=-2',)),
  (IDS, {'min_p': 1.5}, ('min_p=1.5', '[0, 1]')),
  (IDS, {'stop': ['']}, ('stop=', 'not empty')),
  (IDS, {'stop_token_ids': [-3]}, ('stop_token_ids', '>= 0')),
  (IDS, {'stop_token_ids': [99]}, ('stop_token_ids', '99', '[0, 64)')),
  (IDS, {'logprobs': 25}, ('logprobs=25', 'must be an integer in [0, 20]')),
)


def _refusal(call: Any) -> tuple[grpc.StatusCode, str]:
  with pytest.raises(grpc.RpcError):
    list(call)
  return call.code(), call.details()


@pytest.mark.parametrize(
  'fields, sampling, says', BAD, ids=lambda v: str(v)[:40]
)
def test_bad_fields_are_named_and_the_server_lives(
  server: fake.RunningServer,
  fields: dict[str, Any],
  sampling: dict[str, Any],
  says: tuple[str, ...],
) -> None:
  code, details = _refusal(server.generate(sampling=sampling, **fields))
  assert code is grpc.StatusCode.INVALID_ARGUMENT
  assert all(part in details for part in says), details
  assert server.is_alive()


def test_an_empty_request_id_is_refused(server: fake.RunningServer) -> None:
  code, details = _refusal(server.generate(request_id='', **IDS))
  assert code is grpc.StatusCode.INVALID_ARGUMENT
  assert 'request_id' in details


def test_a_chat_without_a_template_is_refused_by_name(
  server: fake.RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
  def refuse(messages: object, check: Any) -> tuple[int, ...]:
    assert messages == [{'role': 'user', 'content': 'hi'}]
    raise errors.UnsupportedError('messages: no chat template.')

  monkeypatch.setattr(server.engine.tokenizer, 'apply_chat_template', refuse)
  code, details = _refusal(
    server.generate(
      chat=pb.Chat(messages=[pb.ChatMessage(role='user', content='hi')])
    )
  )
  assert code is grpc.StatusCode.INVALID_ARGUMENT
  assert 'chat template' in details


def _raw(server: fake.RunningServer, data: bytes) -> Any:
  """Sends bytes that no generated client would."""
  return server.channel.unary_stream('/sarathi.v1.Sarathi/Generate')(
    data, timeout=fake.TIMEOUT_S
  )


@pytest.mark.parametrize(
  'data',
  [
    pb.GenerateRequest(text='t1').SerializeToString() + b'\xf8\x06\x01',
    pb.GenerateRequest(text='t1').SerializeToString()
    + b'\x2a\x03\xf8\x06\x01',  # in `sampling`
  ],
)
def test_a_field_of_a_newer_client_is_refused_not_ignored(
  server: fake.RunningServer, data: bytes
) -> None:
  code, details = _refusal(_raw(server, data))
  assert code is grpc.StatusCode.INVALID_ARGUMENT
  assert 'field number 111' in details


@pytest.mark.parametrize(
  'data',
  [
    b'\x12\x02\xff\xfe',  # text that is not UTF-8
    b'\xff\xff\xff',  # no message
  ],
)
def test_bytes_that_are_no_message(
  server: fake.RunningServer, data: bytes
) -> None:
  code, _ = _refusal(_raw(server, data))
  assert code is grpc.StatusCode.INVALID_ARGUMENT
  assert server.is_alive()


def test_text_and_stop_strings_need_a_tokenizer(gated: Any) -> None:
  running, _ = gated()
  code, details = _refusal(running.generate(text='t1'))
  assert (code, 'no tokenizer' in details) == (
    grpc.StatusCode.INVALID_ARGUMENT,
    True,
  )
  code, details = _refusal(running.generate(sampling={'stop': ['x']}, **IDS))
  assert (code, 'stop=' in details) == (grpc.StatusCode.INVALID_ARGUMENT, True)


def test_a_defect_of_ours_is_internal_and_keeps_its_details(
  server: fake.RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
  def fail(text: str, check: Any) -> tuple[int, ...]:
    raise KeyError('a secret of the prompt')

  monkeypatch.setattr(server.engine.tokenizer, 'encode', fail)
  code, details = _refusal(server.generate(text='t1'))
  assert code is grpc.StatusCode.INTERNAL
  assert 'KeyError' in details and 'secret' not in details
  monkeypatch.undo()
  assert server.is_alive()


@pytest.mark.parametrize(
  'error, code',
  [
    (errors.InvalidRequestError('x'), grpc.StatusCode.INVALID_ARGUMENT),
    (errors.UnsupportedError('x'), grpc.StatusCode.INVALID_ARGUMENT),
    (errors.CapacityError('x'), grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.EngineDeadError('x'), grpc.StatusCode.UNAVAILABLE),
    (ZeroDivisionError('x'), grpc.StatusCode.INTERNAL),
  ],
)
def test_every_error_has_its_status(
  error: Exception, code: grpc.StatusCode
) -> None:
  assert status.of(error)[0] is code
