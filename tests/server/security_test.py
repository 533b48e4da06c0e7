# SPDX-License-Identifier: Apache-2.0
"""Tokens and limits: who gets in, and what is told to whom."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import hashlib
import json
import pathlib
from typing import Any

import grpc
from grpc_health.v1 import health_pb2
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import proto_reflection_descriptor_database
import pytest

from sarathi_jax import errors
from sarathi_jax.server import config as config_lib
from sarathi_jax.server import sarathi_pb2 as pb
from sarathi_jax.server import sarathi_pb2_grpc
from sarathi_jax.server.guard import auth
from sarathi_jax.server.guard import limits
from tests.server import fake

_USER, _ADMIN = 'user-secret', 'admin-secret'


def _metadata(token: str) -> list[tuple[str, str]]:
  return [('authorization', f'Bearer {token}')]


@pytest.fixture
def tokens(tmp_path: pathlib.Path) -> pathlib.Path:
  path = tmp_path / 'tokens'
  digest = hashlib.sha256(_ADMIN.encode()).hexdigest()
  path.write_text(f'# who may call\nann {_USER}\n\nops sha256:{digest} admin\n')
  return path


@pytest.fixture
def guarded(tokens: pathlib.Path) -> Iterator[fake.RunningServer]:
  with contextlib.closing(
    fake.RunningServer(fake.make_engine, auth_tokens=tokens)
  ) as running:
    yield running


def _generate(running: fake.RunningServer, **kwargs: Any) -> grpc.StatusCode:
  return fake.code_of(
    running.stub.Generate(
      pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1])),
      timeout=fake.TIMEOUT_S,
      **kwargs,
    )
  )


def _resume(running: fake.RunningServer, token: str) -> grpc.StatusCode:
  stub: Any = sarathi_pb2_grpc.ControlStub(running.channel)
  call = stub.Resume.future(
    pb.ResumeRequest(), metadata=_metadata(token), timeout=fake.TIMEOUT_S
  )
  return call.code()  # waits


def test_only_who_has_a_token_is_served(guarded: fake.RunningServer) -> None:
  assert _generate(guarded) is grpc.StatusCode.UNAUTHENTICATED
  for bad in ('Bearer wrong', 'Basic abc', f'bearer{_USER}', ''):
    assert _generate(guarded, metadata=[('authorization', bad)]) is (
      grpc.StatusCode.UNAUTHENTICATED
    )
  assert _generate(guarded, metadata=_metadata(_USER)) is grpc.StatusCode.OK
  assert _generate(guarded, metadata=_metadata(_ADMIN)) is grpc.StatusCode.OK


def test_control_and_reflection_need_an_administrator(
  guarded: fake.RunningServer,
) -> None:
  assert _resume(guarded, 'wrong') is grpc.StatusCode.UNAUTHENTICATED
  assert _resume(guarded, _USER) is grpc.StatusCode.PERMISSION_DENIED
  assert _resume(guarded, _ADMIN) is grpc.StatusCode.OK
  database = (
    proto_reflection_descriptor_database.ProtoReflectionDescriptorDatabase(
      guarded.channel
    )
  )
  with pytest.raises(grpc.RpcError) as caught:
    database.get_services()
  assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_probes_need_no_token(guarded: fake.RunningServer) -> None:
  response = health_pb2_grpc.HealthStub(guarded.channel).Check(
    health_pb2.HealthCheckRequest()
  )
  assert response.status == health_pb2.HealthCheckResponse.SERVING


def test_tokens_follow_their_file(
  guarded: fake.RunningServer, tokens: pathlib.Path
) -> None:
  tokens.write_text('bob other-secret admin\n')
  assert _generate(guarded, metadata=_metadata(_USER)) is (
    grpc.StatusCode.UNAUTHENTICATED
  )
  assert _generate(guarded, metadata=_metadata('other-secret')) is (
    grpc.StatusCode.OK
  )
  tokens.write_text('nonsense\n')  # lets nobody new in, and nobody out
  assert _generate(guarded, metadata=_metadata('other-secret')) is (
    grpc.StatusCode.OK
  )


@pytest.mark.parametrize(
  'text, says',
  [
    ('', 'no token'),
    ('ann', 'line 1'),
    ('ann a user', 'line 1'),
    ('ann a priority=x', 'line 1'),
    ('ann a admin admin', 'line 1'),
    ('# x\nann sha256:12', 'line 2'),
  ],
)
def test_a_bad_file_of_tokens_is_named(
  tmp_path: pathlib.Path, text: str, says: str
) -> None:
  (tmp_path / 'tokens').write_text(text)
  with pytest.raises(errors.ConfigError, match=says):
    auth.Tokens(tmp_path / 'tokens')
  with pytest.raises(errors.ConfigError, match='none'):
    auth.Tokens(tmp_path / 'none')


def test_columns_of_the_file_of_tokens() -> None:
  tokens = auth.parse(
    'a 1\nb 2 admin\nc 3 priority=-7\n'
    'd 4 admin priority=0\ne 5 priority=2 admin\n',
    'file',
  )
  assert [(t.name, t.is_admin, t.min_priority) for t in tokens] == [
    ('a', False, 0),
    ('b', True, None),
    ('c', False, -7),
    ('d', True, 0),
    ('e', True, 2),
  ]


def test_the_log_names_the_client_and_no_prompt(
  tokens: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  log = tmp_path / 'log'
  with contextlib.closing(
    fake.RunningServer(
      fake.make_engine, auth_tokens=tokens, request_log=str(log)
    )
  ) as running:
    _generate(running, metadata=[*_metadata(_USER), ('x-client-id', 'app')])
    fake.code_of(
      running.stub.Generate(
        pb.GenerateRequest(text='my secret'), metadata=_metadata(_USER)
      )
    )
  good, bad = map(json.loads, log.read_text().splitlines())
  assert good['client'] == 'ann/app' and good['outcome'] == 'length'
  assert good['output_tokens'] == 16 and good['ttft_s'] > 0
  assert bad['outcome'] == 'INVALID_ARGUMENT'
  assert 'secret' not in log.read_text() and 'prompt_token_ids' not in good


def test_prompts_are_in_the_log_if_asked(tmp_path: pathlib.Path) -> None:
  log = tmp_path / 'log'
  with contextlib.closing(
    fake.RunningServer(fake.make_engine, request_log=str(log), log_prompts=True)
  ) as running:
    _generate(running)
  assert json.loads(log.read_text())['prompt_token_ids'] == [1]


def test_a_log_that_can_not_be_written_is_refused(
  tmp_path: pathlib.Path,
) -> None:
  with pytest.raises(errors.ConfigError, match='request_log'):
    fake.RunningServer(fake.make_engine, request_log=str(tmp_path))


def test_reflection_and_control_can_be_shut_off() -> None:
  with contextlib.closing(
    fake.RunningServer(fake.make_engine, reflection=False, control=False)
  ) as running:
    assert _resume(running, '') is grpc.StatusCode.UNIMPLEMENTED
    database = (
      proto_reflection_descriptor_database.ProtoReflectionDescriptorDatabase(
        running.channel
      )
    )
    with pytest.raises(grpc.RpcError):
      database.get_services()


@pytest.mark.parametrize(
  'fields, served',
  [
    ({}, True),
    ({'host': '0.0.0.0'}, False),
    ({'host': '::1'}, True),
    ({'host': '0.0.0.0', 'auth_tokens': pathlib.Path('x')}, True),
    ({'host': '0.0.0.0', 'control': True}, True),
    ({'control': False}, False),
  ],
)
def test_control_is_not_offered_to_strangers(
  fields: dict[str, Any], served: bool
) -> None:
  assert config_lib.ServerConfig(**fields).serves_control is served


def test_a_message_too_large_is_refused() -> None:
  with contextlib.closing(
    fake.RunningServer(
      fake.make_engine, limits=limits.Limits(max_message_mib=0.01)
    )
  ) as running:
    call = running.generate(text='x' * 20_000)
    assert fake.code_of(call) is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert running.is_alive()
