# SPDX-License-Identifier: Apache-2.0
"""Tokens, TLS, limits: who gets in, and what is told to whom."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import socket
import ssl
import subprocess
from typing import Any
import urllib.request

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
from sarathi_jax.server.guard import tls
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


def _code(call: Any) -> grpc.StatusCode:
  with contextlib.suppress(grpc.RpcError):
    list(call)
  return call.code()


def _generate(running: fake.RunningServer, **kwargs: Any) -> grpc.StatusCode:
  return _code(
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
    _code(
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
    assert _code(call) is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert running.is_alive()


def _openssl(folder: pathlib.Path, *args: str) -> None:
  subprocess.run(
    ['openssl', *args], cwd=folder, check=True, capture_output=True
  )


@pytest.fixture(scope='module')
def certs(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """ca.pem, and what it signed: server.pem, client.pem, new.pem."""
  folder = tmp_path_factory.mktemp('certs')
  _openssl(
    folder,
    'req',
    '-x509',
    '-newkey',
    'rsa:2048',
    '-nodes',
    '-days',
    '1',
    '-subj',
    '/CN=test ca',
    '-keyout',
    'ca.key',
    '-out',
    'ca.pem',
  )
  (folder / 'ext').write_text('subjectAltName=IP:127.0.0.1,DNS:localhost\n')
  for name in ('server', 'client', 'new'):
    _openssl(
      folder,
      'req',
      '-newkey',
      'rsa:2048',
      '-nodes',
      '-subj',
      f'/CN={name}',
      '-keyout',
      f'{name}.key',
      '-out',
      f'{name}.csr',
    )
    _openssl(
      folder,
      'x509',
      '-req',
      '-in',
      f'{name}.csr',
      '-CA',
      'ca.pem',
      '-CAkey',
      'ca.key',
      '-CAcreateserial',
      '-days',
      '1',
      '-extfile',
      'ext',
      '-out',
      f'{name}.pem',
    )
  return folder


def _is_served(
  running: fake.RunningServer, certs: pathlib.Path, client: str | None = None
) -> bool:
  key, chain = (
    (None, None)
    if client is None
    else ((certs / f'{client}.{end}').read_bytes() for end in ('key', 'pem'))
  )
  credentials = grpc.ssl_channel_credentials(
    (certs / 'ca.pem').read_bytes(), key, chain
  )
  with grpc.secure_channel(
    f'127.0.0.1:{running.server.port}', credentials
  ) as channel:
    stub = running.stub_of(channel)
    return (
      _code(
        stub.Generate(
          pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1])), timeout=5
        )
      )
      is grpc.StatusCode.OK
    )


def test_tls(certs: pathlib.Path) -> None:
  files = tls.TlsFiles(cert=certs / 'server.pem', key=certs / 'server.key')
  with contextlib.closing(
    fake.RunningServer(fake.make_engine, tls=files)
  ) as running:
    assert _is_served(running, certs)
    assert _generate(running) is grpc.StatusCode.UNAVAILABLE  # plain text


def test_mutual_tls(certs: pathlib.Path) -> None:
  files = tls.TlsFiles(
    cert=certs / 'server.pem',
    key=certs / 'server.key',
    client_ca=certs / 'ca.pem',
  )
  with contextlib.closing(
    fake.RunningServer(fake.make_engine, tls=files)
  ) as running:
    assert _is_served(running, certs, 'client')
    assert not _is_served(running, certs)


def test_a_renewed_certificate_is_used(
  certs: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  files = tls.TlsFiles(cert=tmp_path / 'cert.pem', key=tmp_path / 'key.pem')

  def install(name: str) -> None:
    for path, end in ((files.cert, 'pem'), (files.key, 'key')):
      (tmp_path / 'part').write_bytes((certs / f'{name}.{end}').read_bytes())
      os.replace(tmp_path / 'part', path)

  def served(running: fake.RunningServer) -> str:
    return ssl.get_server_certificate(('127.0.0.1', running.server.port))

  install('server')
  with contextlib.closing(
    fake.RunningServer(fake.make_engine, tls=files)
  ) as running:
    assert served(running).split() == (certs / 'server.pem').read_text().split()
    install('new')
    assert served(running).split() == (certs / 'new.pem').read_text().split()
    assert _is_served(running, certs)


def _scrapes(
  running: fake.RunningServer, certs: pathlib.Path, client: str | None = None
) -> bool:
  context = ssl.create_default_context(cafile=certs / 'ca.pem')
  if client is not None:
    context.load_cert_chain(certs / f'{client}.pem', certs / f'{client}.key')
  port = running.server.telemetry.metrics_port
  try:
    with urllib.request.urlopen(
      f'https://127.0.0.1:{port}/metrics', context=context, timeout=5
    ) as reply:
      return b'sarathi:engine_up' in reply.read()
  except OSError:
    return False


def test_metrics_are_guarded_as_calls_are(
  certs: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  files = tls.TlsFiles(
    cert=tmp_path / 'cert.pem',
    key=tmp_path / 'key.pem',
    client_ca=certs / 'ca.pem',
  )

  def install(name: str) -> None:
    for path, end in ((files.cert, 'pem'), (files.key, 'key')):
      shutil.copy(certs / f'{name}.{end}', path)

  install('server')
  with contextlib.closing(
    fake.RunningServer(fake.make_engine, tls=files, metrics_port=0)
  ) as running:
    address = '127.0.0.1', running.server.telemetry.metrics_port
    with socket.create_connection(address):  # says nothing, holds up nobody
      assert _scrapes(running, certs, 'client')
    assert not _scrapes(running, certs)
    with (
      pytest.raises(OSError),
      urllib.request.urlopen(
        f'http://127.0.0.1:{address[1]}/metrics', timeout=5
      ),
    ):
      pass
    install('new')
    assert _scrapes(running, certs, 'client')
    assert (
      ssl.get_server_certificate(address).split()
      == (certs / 'new.pem').read_text().split()
    )


def test_a_missing_certificate_is_one_error(tmp_path: pathlib.Path) -> None:
  with pytest.raises(errors.ConfigError, match='tls_key'):
    tls.credentials(tls.TlsFiles(cert=tmp_path / 'a', key=tmp_path / 'b'))
