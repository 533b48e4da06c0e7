# SPDX-License-Identifier: Apache-2.0
"""Certificates: of the server, of clients, and new ones."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import socket
import ssl
import subprocess
from typing import Any
import urllib.request

import grpc
import pytest

from sarathi_jax import errors
from sarathi_jax.server import sarathi_pb2 as pb
from sarathi_jax.server.guard import tls
from tests.server import fake


def _code(stub: Any) -> grpc.StatusCode:
  return fake.code_of(
    stub.Generate(pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1])), timeout=5)
  )


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
    return _code(stub) is grpc.StatusCode.OK


def test_tls(certs: pathlib.Path) -> None:
  files = tls.TlsFiles(cert=certs / 'server.pem', key=certs / 'server.key')
  with contextlib.closing(
    fake.RunningServer(fake.make_engine, tls=files)
  ) as running:
    assert _is_served(running, certs)
    assert _code(running.stub) is grpc.StatusCode.UNAVAILABLE  # plain text


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
