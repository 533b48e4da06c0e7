# SPDX-License-Identifier: Apache-2.0
"""OpenAI's HTTP, our own: who gets in, and what of a client is bounded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import functools
import json
import pathlib
import socket
import ssl
import subprocess
import time
from typing import Any

import pytest

from sarathi_jax import errors
from sarathi_jax.server import config as config_lib
from sarathi_jax.server.guard import limits as limits_lib
from sarathi_jax.server.guard import tls
from sarathi_jax.server.http import body as body_lib
from sarathi_jax.server.http import connection as connection_lib
from sarathi_jax.server.http import exchange
from sarathi_jax.server.http import listener
from tests.server import fake
from tests.server.http_client import CHAT
from tests.server.http_client import PROMPT
from tests.server.http_client import Client

_LIMITS = limits_lib.Limits(max_message_mib=1.0, max_connections=40)


@contextlib.contextmanager
def _serve(
  chat_folder: pathlib.Path | None = None, **config: Any
) -> Iterator[tuple[fake.RunningServer, Client]]:
  with contextlib.closing(
    fake.RunningServer(
      functools.partial(fake.make_engine, tokenizer_folder=chat_folder),
      http_port=0,
      **config,
    )
  ) as running:
    yield running, Client.of(running)


@pytest.fixture(scope='module')
def served(
  chat_folder: pathlib.Path,
) -> Iterator[tuple[fake.RunningServer, Client]]:
  with _serve(chat_folder, limits=_LIMITS) as both:
    yield both


@pytest.fixture
def client(served: tuple[fake.RunningServer, Client]) -> Iterator[Client]:
  """Which is served after each test, too."""
  yield served[1]
  assert served[1].serves()


# Who gets in.


def test_tokens(chat_folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
  path = tmp_path / 'tokens'
  path.write_text('ann ann-secret\nbob bob-secret priority=-5\n')
  with _serve(chat_folder, auth_tokens=path) as (running, client):
    got = []
    add = running.engine.add
    running.engine.add = lambda request: (got.append(request), add(request))
    for method, where in (
      ('POST', '/v1/completions'),
      ('POST', '/v1/chat/completions'),
      ('POST', '/tokenize'),
      ('POST', '/detokenize'),
      ('GET', '/v1/models'),
      ('GET', '/v1/models/counting'),
      ('GET', '/nowhere'),
    ):
      for headers in (
        {},
        {'authorization': 'Bearer wrong'},
        {'authorization': 'ann-secret'},
        {'x-api-key': 'ann-secret'},
      ):
        status, said, text = client.ask(method, where, PROMPT, **headers)
        assert status == 401 and said['www-authenticate'] == 'Bearer'
        assert json.loads(text)['error']['code'] == 'invalid_api_key'
    assert client.ask('GET', '/health')[0] == 200
    ann, bob = (
      {'authorization': f'Bearer {name}-secret', 'x-client-id': 'c'}
      for name in ('ann', 'bob')
    )
    urgent = {**PROMPT, 'priority': -5}
    assert client.json('/v1/completions', PROMPT, **ann)[0] == 200
    assert client.json('/v1/completions', urgent, **bob)[0] == 200
    status, told = client.json('/v1/completions', urgent, **ann)
    assert status == 403 and told['error']['param'] == 'priority'
    assert [(r.tenant, r.client, r.priority) for r in got] == [
      ('ann', 'ann/c', 0),
      ('bob', 'bob/c', -5),
    ]
    path.write_text('carl carl-secret\n')
    status, _ = client.json('/v1/completions', PROMPT, **ann)
    assert status == 401


def test_a_client_cannot_take_anothers_address(
  chat_folder: pathlib.Path,
) -> None:
  with _serve(chat_folder) as (running, client):
    got = []
    add = running.engine.add
    running.engine.add = lambda request: (got.append(request), add(request))
    client.json('/v1/completions', PROMPT, **{'x-forwarded-for': '1.2.3.4'})
    list(running.generate(token_ids=[1]))
    over_http, over_grpc = got
    assert over_http.tenant == over_grpc.tenant == 'ipv4:127.0.0.1'


def _certificate(folder: pathlib.Path, name: str) -> None:
  command = (
    'openssl req -x509 -newkey rsa:2048 -nodes -days 1 -addext '
    f'subjectAltName=DNS:{name} -subj /CN={name} -keyout key.pem -out cert.pem'
  )
  subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)


def test_tls_follows_its_files(
  chat_folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  def names() -> str:
    pem = ssl.get_server_certificate(('127.0.0.1', client.port))
    der = ssl.PEM_cert_to_DER_cert(pem)
    return 'one' if b'one' in der else 'two' if b'two' in der else ''

  _certificate(tmp_path, 'one')
  files = tls.TlsFiles(cert=tmp_path / 'cert.pem', key=tmp_path / 'key.pem')
  with _serve(chat_folder, tls=files) as (running, client):
    context = ssl.create_default_context(cafile=str(files.cert))
    with (
      socket.create_connection(('127.0.0.1', client.port)) as plain,
      context.wrap_socket(plain, server_hostname='one') as wrapped,
    ):
      wrapped.sendall(_request('POST /v1/completions', PROMPT))
      assert _status(wrapped) == 200
    assert names() == 'one'
    _certificate(tmp_path, 'two')
    assert names() == 'two'
    with pytest.raises(OSError):
      client.ask('GET', '/health')  # in plain text
    assert running.server.fault is None


def test_mutual_tls(chat_folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
  _certificate(tmp_path, 'one')
  cert, key = tmp_path / 'cert.pem', tmp_path / 'key.pem'
  files = tls.TlsFiles(cert=cert, key=key, client_ca=cert)
  with _serve(chat_folder, tls=files) as (_, client):
    for has_certificate in (False, True):
      context = ssl.create_default_context(cafile=str(cert))
      if has_certificate:
        context.load_cert_chain(cert, key)
      status = 0
      with (
        contextlib.suppress(OSError),
        socket.create_connection(('127.0.0.1', client.port)) as plain,
        context.wrap_socket(plain, server_hostname='one') as wrapped,
      ):
        wrapped.sendall(_request('POST /v1/completions', PROMPT))
        status = _status(wrapped)
      assert status == (200 if has_certificate else 0)


def test_a_port_in_use_is_told_at_once() -> None:
  with socket.create_server(('127.0.0.1', 0)) as other:
    port = other.getsockname()[1]
    config = config_lib.ServerConfig(http_port=port)
    with pytest.raises(errors.ConfigError, match=f'http_port={port}: can'):
      listener.Listener(config, None)  # type: ignore[arg-type]


# What is no request.


def _request(line: str, body: Any = None, *headers: str) -> bytes:
  data = body if isinstance(body, bytes) else json.dumps(body).encode()
  lines = (
    f'{line} HTTP/1.1',
    'host: x',
    'content-type: application/json',
    *(headers or (f'content-length: {len(data)}',)),
  )
  return '\r\n'.join(lines).encode() + b'\r\n\r\n' + data


def _status(connection: socket.socket) -> int:
  with connection.makefile('rb') as reader:
    return _read(reader)[0]


def _read(reader: Any) -> tuple[int, Any]:
  """The status of a response, and its JSON; 0 if there is none."""
  first = reader.readline()
  if not first:
    return 0, None
  length = 0
  while line := reader.readline().strip():
    name, _, value = line.partition(b':')
    length = int(value) if name.lower() == b'content-length' else length
  return int(first.split()[1]), json.loads(reader.read(length) or b'null')


def _ask(client: Client, data: bytes) -> tuple[int, Any]:
  with socket.create_connection(
    ('127.0.0.1', client.port), timeout=fake.TIMEOUT_S
  ) as connection:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
      connection.sendall(data)
    with connection.makefile('rb') as reader:
      return _read(reader)


_POST = 'POST /v1/completions'
_GOOD = json.dumps(PROMPT).encode()
_CHUNKED = 'transfer-encoding: chunked'
MALFORMED: dict[str, tuple[bytes, int]] = {
  'no HTTP': (b'\x16\x03\x01 nonsense\r\n\r\n', 400),
  'no version': (b'GET /nowhere\r\n\r\n', 404),
  'an odd method': (b'ODD / HTTP/1.1\r\n\r\n', 400),
  'connect': (b'CONNECT x:1 HTTP/1.1\r\nhost: x\r\n\r\n', 400),
  'no path': (_request('GET /nowhere'), 404),
  'a slash too many': (_request('GET /health/'), 404),
  'an escaped path': (_request('GET /%2e%2e/%00/etc/passwd'), 404),
  'a path outside ASCII': (b'GET /\xff\xfe HTTP/1.1\r\nhost: x\r\n\r\n', 400),
  'wrong method': (_request('GET /v1/completions'), 405),
  'another wrong method': (_request('DELETE /v1/models'), 405),
  'options': (_request('OPTIONS /v1/completions'), 405),
  'two lengths': (
    _request(_POST, b'', 'content-length: 5', 'content-length: 6') + b'x' * 6,
    400,
  ),
  'length and chunks': (
    _request(_POST, b'', 'content-length: 5', _CHUNKED) + b'0\r\n\r\n',
    400,
  ),
  'a length below zero': (_request(_POST, b'', 'content-length: -1'), 400),
  'no body': (_request(_POST, b''), 400),
  'not JSON': (_request(_POST, b'{'), 400),
  'no object': (_request(_POST, b'[]'), 400),
  'not UTF-8': (_request(_POST, b'{"prompt": "\xff"}'), 400),
  'UTF-16': (_request(_POST, '{"prompt": "a"}'.encode('utf-16')), 400),
  'not a number': (_request(_POST, b'{"temperature": NaN}'), 400),
  'a field twice': (_request(_POST, b'{"prompt": "a", "prompt": "b"}'), 400),
  'a lone surrogate': (_request(_POST, b'{"prompt": "\\ud800"}'), 400),
  'deep': (_request(_POST, b'{"a":' * 10_000), 400),
  'deep lists': (_request(_POST, b'{"a":' + b'[' * 60_000), 400),
  'a long number': (_request(_POST, b'{"seed": ' + b'1' * 5000 + b'}'), 400),
  'a longer number': (
    _request(_POST, b'{"seed": ' + b'1' * 10**6 + b'}'),
    400,
  ),
  'many keys': (
    _request(
      _POST,
      json.dumps({f'k{i}': 0 for i in range(70_000)}).encode()[:1_000_000],
    ),
    400,
  ),
  'many lists': (_request(_POST, b'{"a": [' + b'[],' * 70_000), 400),
  'many texts': (_request(_POST, b'{"a": [' + b'"",' * 70_000), 400),
  'many in a text': (
    _request(_POST, json.dumps({'prompt': ',[{:"' * 20_000}).encode()),
    400,  # by its characters, not by these
  ),
  'another type': (
    _request(_POST, b'a=1').replace(b'application/json', b'text/plain'),
    415,
  ),
  'compressed': (
    _request(_POST, b'abc', 'content-encoding: gzip', 'content-length: 3'),
    415,
  ),
  'a long body': (_request(_POST, b'x' * (1 << 20) + b'y'), 413),
  'a longer body': (_request(_POST, b'', 'content-length: 99999999999'), 413),
  'a length that is no number': (
    _request(_POST, b'', f'content-length: {"9" * 30}'),
    400,
  ),
  'long in chunks': (
    _request(_POST, b'', _CHUNKED)
    + b''.join(b'10000\r\n' + b'x' * 0x10000 + b'\r\n' for _ in range(17)),
    413,
  ),
  'chunks of a byte': (
    _request(_POST, b'', _CHUNKED) + b'1\r\nx\r\n' * 50_000,
    400,
  ),
  'a chunk that is none': (_request(_POST, b'', _CHUNKED) + b'xyz\r\n', 400),
  'many headers': (
    b'GET /health HTTP/1.1\r\n' + b'a: b\r\n' * 5000 + b'\r\n',
    431,
  ),
  'a long header': (b'GET /health HTTP/1.1\r\na: ' + b'b' * 300_000, 431),
  'a long line': (b'GET /' + b'b' * 300_000, 431),
  'a long trailer': (
    _request(_POST, b'', _CHUNKED) + b'0\r\na: ' + b'b' * 300_000,
    431,
  ),
  'a long extension': (
    _request(_POST, b'', _CHUNKED) + b'1;a=' + b'b' * 300_000,
    431,
  ),
}


@pytest.mark.parametrize('name', MALFORMED)
def test_what_is_no_request(client: Client, name: str) -> None:
  data, status = MALFORMED[name]
  got, told = _ask(client, data)
  assert got == status, told
  error = told['error']
  assert set(error) == {'message', 'type', 'param', 'code'}
  assert error['message'] and error['type'] == 'invalid_request_error'
  assert len(error['message']) < 600


def test_what_is_unusual_and_right(client: Client) -> None:
  tail = b''.join(b'1\r\n%c\r\n' % byte for byte in _GOOD) + b'0\r\n\r\n'
  for data in (
    _request(_POST, b'', _CHUNKED) + tail,
    _request(_POST, _GOOD).replace(b'HTTP/1.1', b'HTTP/1.0'),
    _request(_POST, _GOOD).replace(b'application/json', b'Application/JSON;x'),
    _request(_POST, _GOOD).replace(b'content-type: application/json\r\n', b''),
    _request(_POST + '?x=1', _GOOD),
  ):
    assert _ask(client, data)[0] == 200, data
  with socket.create_connection(('127.0.0.1', client.port)) as connection:
    request = _request(_POST, PROMPT)
    with connection.makefile('rb') as reader:
      for _ in range(3):  # on one connection; one after what was refused, too
        connection.sendall(request)
        assert _read(reader)[0] == 200
        connection.sendall(_request(_POST, b'x' * (1 << 20) + b'y'))
        assert _read(reader)[0] == 413
      connection.sendall(3 * request)  # pipelined
      assert [_read(reader)[0] for _ in range(3)] == [200] * 3


def test_a_head_is_to_be_here_soon(
  client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(connection_lib, '_HEAD_S', 0.2)
  for beginning in (b'', b'GET /health HTTP/1.1\r\nx: '):
    with socket.create_connection(('127.0.0.1', client.port)) as connection:
      connection.settimeout(fake.TIMEOUT_S)
      connection.sendall(beginning)
      assert connection.recv(1) == b''
  with (
    socket.create_connection(('127.0.0.1', client.port)) as connection,
    connection.makefile('rb') as reader,
  ):
    connection.sendall(_request('GET /health'))
    assert _read(reader)[0] == 200
    time.sleep(0.3)  # idle is another thing
    connection.sendall(_request('GET /health'))
    assert _read(reader)[0] == 200


def test_a_body_is_to_be_here_soon(
  client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(exchange, 'BODY_S', 0.2)
  status, told = _ask(client, _request(_POST, b'{', 'content-length: 100'))
  assert status == 408 and 'after 0.2 s' in told['error']['message']


def test_a_client_that_reads_nothing_is_cut_off(
  gated: Callable[..., Any],
  chat_folder: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  """It would keep its request, or what waits for it, for ever."""
  monkeypatch.setattr(connection_lib, 'WRITE_S', 0.3)
  running, runner = gated(
    tokenizer_folder=chat_folder,
    max_model_len=2**16,
    num_pages=2**15,
    config={'http_port': 0},
  )
  runner.open()
  body = {'prompt': 't1', 'max_tokens': 2**15, 'ignore_eos': True}
  with socket.socket() as connection:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(('127.0.0.1', running.server.http_port))
    connection.sendall(
      _request(_POST, {**body, 'stream': True, 'return_token_ids': True})
    )
    fake.wait_until(lambda: running.server.frontend.num_open == 1)
    fake.wait_until(lambda: running.server.frontend.num_open == 0)
  running.assert_nothing_is_left()


def test_connections_are_bounded(
  served: tuple[fake.RunningServer, Client], client: Client
) -> None:
  with contextlib.ExitStack() as stack:
    held = [
      stack.enter_context(socket.create_connection(('127.0.0.1', client.port)))
      for _ in range(_LIMITS.max_connections)
    ]
    for connection in held[-3:]:
      connection.sendall(_request('GET /health'))
      connection.settimeout(fake.TIMEOUT_S)
    status, told = _ask(client, b'')
    assert status == 503 and 'connections' in told['error']['message']
    assert served[0].is_alive()  # over gRPC
  fake.wait_until(client.serves)


def test_bodies_that_come_slowly_are_bounded_together(
  chat_folder: pathlib.Path,
) -> None:
  limits = limits_lib.Limits(max_message_mib=1.0, max_bodies_mib=1.5)
  with (
    _serve(chat_folder, limits=limits) as (running, client),
    contextlib.ExitStack() as stack,
  ):
    app: Any = running.server._http._app
    (room,) = {route.endpoint._room for route in app.routes}
    for _ in range(2):
      held = stack.enter_context(
        socket.create_connection(('127.0.0.1', client.port))
      )
      held.sendall(_request(_POST, b' ' * 700_000, f'content-length: {2**20}'))

    def status() -> int:
      return _ask(client, _request(_POST, b' ' * 400_000 + b'{}'))[0]

    fake.wait_until(lambda: room._num == 1_400_000)
    assert status() == 429
    stack.close()
    fake.wait_until(lambda: status() == 400)  # it has no prompt
    assert client.serves()


# What holds the interpreter.


@pytest.mark.parametrize(
  'text',
  [
    '{"a": "\\\\", "b": [1, 2]}',
    '{"a": "\\"[[[,,,", "b": "\\\\\\""}',
    '{"a\\u0022": ["x,y", {}, []]}',
  ],
)
@pytest.mark.parametrize('size', [1, 2, 3, 7, 2**16])
def test_parts_are_counted_whatever_the_slices(
  text: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(body_lib, '_SLICE', size)
  num = num_numbers = 0

  def walk(value: Any) -> None:
    nonlocal num, num_numbers
    if isinstance(value, (dict, list)):
      num_numbers += max(len(value) - 1, 0)
      for part in value.values() if isinstance(value, dict) else value:
        walk(part)

  walk(json.loads(text))
  body_lib.check(
    text.encode(), limits_lib.Limits(max_numbers=max(num_numbers, 1))
  )
  if num_numbers > 1:
    with pytest.raises(errors.InvalidRequestError, match='max_numbers'):
      body_lib.check(
        text.encode(), limits_lib.Limits(max_numbers=num_numbers - 1)
      )


@pytest.mark.parametrize('part', ['\\n', '\\u00e9', '\\\\', '\\"'])
def test_escapes_are_counted(part: str) -> None:
  """A text of 15 MiB of them held the interpreter for 100 ms."""
  limits = limits_lib.Limits(max_escapes=100)
  num = 100 // part.count('\\')
  body_lib.parse(f'{{"a": "{part * num}"}}'.encode(), limits)
  with pytest.raises(errors.InvalidRequestError, match='max_escapes=100'):
    body_lib.check(f'{{"a": "{part * (num + 1)}"}}'.encode(), limits)


def test_long_prompts_are_parsed() -> None:
  limits = limits_lib.Limits()
  ids = list(range(200_000))
  data = json.dumps({'prompt': ids}).encode()
  assert body_lib.parse(data, limits) == {'prompt': ids}
  chat = {**CHAT, 'messages': CHAT['messages'] * 10_000}
  assert body_lib.parse(json.dumps(chat).encode(), limits) == chat
  text = {'prompt': 'if x[0] == {"a": [1, 2]}:\n' * 20_000}
  assert body_lib.parse(json.dumps(text).encode(), limits) == text


def test_nothing_is_left(served: tuple[fake.RunningServer, Client]) -> None:
  served[0].assert_nothing_is_left()
