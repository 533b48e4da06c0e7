# SPDX-License-Identifier: Apache-2.0
"""smg before a server: who may do what, what it passes on, what ends it."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import http.client
import json
import os
import pathlib
import re
import signal
import socket

from grpc_health.v1 import health_pb2
from grpc_health.v1 import health_pb2_grpc
import psutil
import pytest

from sarathi_jax import types
from sarathi_jax.server import gateway as gateway_lib
from sarathi_jax.server.guard import limits as limits_lib
from sarathi_jax.server.protocols import health
from tests.server import behind_smg
from tests.server import fake
from tests.server import http_client
from tests.server.http_client import BODIES
from tests.server.http_client import CHAT
from tests.server.http_client import PROMPT
from tests.server.http_client import Client

USER_KEY = 'user-key'
# All that changes smg, or tells of it, as its own log lists them.
CONTROL = (
  ('GET', '/workers'),
  ('POST', '/workers'),
  ('GET', '/workers/ID'),
  ('PUT', '/workers/ID'),
  ('PATCH', '/workers/ID'),
  ('DELETE', '/workers/ID'),
  ('POST', '/flush_cache'),
  ('POST', '/start_profile'),
  ('POST', '/stop_profile'),
  ('POST', '/heap_profile'),
  ('GET', '/get_loads'),
  ('POST', '/parse/function_call'),
  ('POST', '/parse/reasoning'),
  ('GET', '/wasm'),
  ('POST', '/wasm'),
  ('DELETE', '/wasm/ID'),
  ('GET', '/v1/tokenizers'),
  ('POST', '/v1/tokenizers'),
  ('GET', '/v1/tokenizers/ID'),
  ('DELETE', '/v1/tokenizers/ID'),
  ('GET', '/v1/tokenizers/ID/status'),
)
# Of no use to anybody but who runs it; not built, or not switched on.
ABSENT = (
  ('POST', '/add_worker'),
  ('POST', '/remove_worker'),
  ('GET', '/list_workers'),
  ('POST', '/v1/rl/pause'),
  ('POST', '/workers/ID/engine/pause'),
  ('GET', '/ha/health'),
)


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  return http_client.write_tokenizer(tmp_path_factory.mktemp('tokenizer'))


@pytest.fixture(scope='module')
def served(folder: pathlib.Path) -> Iterator[tuple[fake.RunningServer, Client]]:
  with behind_smg.serve(folder) as both:
    yield both


@pytest.fixture(scope='module')
def guarded(
  folder: pathlib.Path,
) -> Iterator[tuple[fake.RunningServer, Client]]:
  with behind_smg.serve(folder, gateway_args=('--api-key', USER_KEY)) as both:
    yield both


def _refuses_control(client: Client, **headers: str) -> None:
  for method, path in CONTROL:
    body = {'url': 'grpc://127.0.0.1:9'} if method in ('POST', 'PUT') else None
    status, _, text = client.ask(method, path, body, **headers)
    assert status == 401, (method, path, status, text)
  for method, path in ABSENT:
    assert client.ask(method, path, **headers)[0] == 404, path


def test_nobody_reaches_the_control_plane(
  served: tuple[fake.RunningServer, Client],
) -> None:
  running, client = served
  assert client.complete() == (200, 't3 t4 t5 t6')
  _refuses_control(client)
  for guess in ('', 'sarathi', 'admin', '0' * 64):
    _refuses_control(client, authorization=f'Bearer {guess}')
  assert client.complete() == (200, 't3 t4 t5 t6')
  assert running.is_alive()


def test_a_user_with_a_key_does_not_either(
  guarded: tuple[fake.RunningServer, Client],
) -> None:
  _, client = guarded
  bearer = {'authorization': f'Bearer {USER_KEY}'}
  assert client.complete()[0] == 401
  assert client.complete(**bearer) == (200, 't3 t4 t5 t6')
  _refuses_control(client)
  _refuses_control(client, **bearer)
  assert client.complete(**bearer) == (200, 't3 t4 t5 t6')


def test_the_keys_of_who_runs_it_open_it(folder: pathlib.Path) -> None:
  with behind_smg.serve(
    folder, gateway_args=('--control-plane-api-keys', 'ops:ops:admin:their-key')
  ) as (_, client):
    _refuses_control(client)
    status, _, text = client.ask(
      'GET', '/workers', authorization='Bearer their-key'
    )
    assert status == 200 and len(json.loads(text)['workers']) == 1


def test_nobody_has_it_connect_to_others(
  served: tuple[fake.RunningServer, Client],
) -> None:
  _, client = served
  with socket.create_server(('127.0.0.1', 0)) as other:
    other.settimeout(0.5)
    status, _, text = client.ask(
      'POST',
      '/v1/responses',
      {
        'model': 'counting',
        'input': 't1',
        'tools': [
          {
            'type': 'mcp',
            'server_label': 'x',
            'server_url': (f'http://127.0.0.1:{other.getsockname()[1]}/mcp'),
          }
        ],
      },
    )
    assert status == 424 and 'connect to MCP' in text
    with pytest.raises(TimeoutError):
      other.accept()
  assert client.serves()


def test_it_asks_no_hub_of_the_model(
  folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  with socket.create_server(('127.0.0.1', 0)) as hub:
    hub.settimeout(0.5)
    monkeypatch.setenv(
      'HF_ENDPOINT', f'http://127.0.0.1:{hub.getsockname()[1]}'
    )
    with behind_smg.serve(folder) as (_, client):
      status, _ = client.json('/v1/chat/completions', CHAT)
      assert status == 200
      with pytest.raises(TimeoutError):
        hub.accept()


def test_the_key_is_nowhere_to_be_seen(
  guarded: tuple[fake.RunningServer, Client], monkeypatch: pytest.MonkeyPatch
) -> None:
  running, client = guarded
  gateway = running.server._gateway
  assert gateway is not None
  keys: list[str] = []
  tell = gateway._tell

  def spy(pipe: int) -> None:
    monkeypatch.setattr(
      'secrets.token_hex',
      lambda n: keys.append(os.urandom(n).hex()) or keys[-1],
    )  # type: ignore[func-returns-value]
    tell(pipe)
    monkeypatch.undo()

  monkeypatch.setattr(gateway, '_tell', spy)
  before = gateway.pid
  assert before is not None
  os.kill(before, signal.SIGKILL)
  fake.wait_until(lambda: bool(keys) and gateway.pid is not None)
  child = psutil.Process(gateway.pid)
  while not gateway.is_serving:  # from its first moment on
    assert not any(
      keys[0] in word or USER_KEY in word
      for word in (*child.cmdline(), *child.environ().values())
    )
  assert keys[0] not in ''.join(child.cmdline())
  bearer = {'authorization': f'Bearer {keys[0]}'}
  assert client.ask('GET', '/workers', **bearer)[0] == 200  # it is the key


def test_a_long_line_in_its_log_ends_nothing(
  served: tuple[fake.RunningServer, Client],
) -> None:
  running, client = served
  gateway = running.server._gateway
  assert gateway is not None
  pid = gateway.pid
  for value in ('m' * 200_000, '\x1b[2J\r\n\0'):
    for path, body in (('completions', PROMPT), ('chat/completions', CHAT)):
      assert (
        client.ask('POST', f'/v1/{path}', {**body, 'model': value})[0] == 404
      )
  assert client.serves() and gateway.pid == pid


@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGSTOP])
def test_it_is_replaced(
  served: tuple[fake.RunningServer, Client],
  number: signal.Signals,
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  monkeypatch.setattr(gateway_lib, '_PROBE_S', 0.2)
  monkeypatch.setattr(gateway_lib, '_ANSWER_S', 1.5)
  running, client = served
  stub = health_pb2_grpc.HealthStub(running.channel)

  def says() -> int:
    status: int = stub.Check(
      health_pb2.HealthCheckRequest(service=health.GATEWAY)
    ).status
    return status

  fake.wait_until(lambda: says() == 1)
  before = running.server.watch.num_restarts['gateway']
  gateway = running.server._gateway
  assert gateway is not None and gateway.pid is not None
  os.kill(gateway.pid, number)
  fake.wait_until(lambda: says() == 2)  # NOT_SERVING
  assert running.is_alive()
  fake.wait_until(lambda: says() == 1, 40)
  assert client.serves()
  assert running.server.watch.num_restarts['gateway'] == before + 1


def test_too_many_are_told_when_to_come_again(folder: pathlib.Path) -> None:
  runners: list[fake.GatedRunner] = []

  def make_runner(*args: int) -> fake.GatedRunner:
    runners.append(fake.GatedRunner(*args))
    return runners[0]

  with behind_smg.serve(
    folder,
    limits=limits_lib.Limits(max_waiting=3),
    engine={'runner': make_runner, 'max_num_seqs': 1},
  ) as (running, client):
    with contextlib.ExitStack() as stack:
      stack.callback(runners[0].open)
      streams = []
      for _ in range(4):
        streams.append(
          stack.enter_context(
            contextlib.closing(
              http.client.HTTPConnection('127.0.0.1', client.port)
            )
          )
        )
        streams[-1].request(
          'POST',
          '/v1/completions',
          json.dumps(PROMPT),
          {'content-type': 'application/json'},
        )
      running.wait_until_open(4)
      status, headers, _ = client.ask('POST', '/v1/completions', PROMPT)
      assert status == 429 and int(headers['retry-after']) >= 1
      runners[0].open()
      assert [s.getresponse().status for s in streams] == [200] * 4
    fake.wait_until(client.serves)


def test_where_the_server_is_the_first_to_refuse_the_message_says_when(
  folder: pathlib.Path,
) -> None:
  """smg leaves trailing metadata out; if it no longer does, README has to say
  so."""
  runners: list[fake.GatedRunner] = []

  def make_runner(*args: int) -> fake.GatedRunner:
    runners.append(fake.GatedRunner(*args))
    return runners[0]

  with behind_smg.serve(
    folder,
    limits=limits_lib.Limits(max_waiting_tokens=4),
    engine={'runner': make_runner, 'max_num_seqs': 1},
  ) as (running, client):
    try:
      calls = []
      for num_open in (1, 2):
        calls.append(running.generate(token_ids=[1, 2, 3]))
        running.wait_until_open(num_open)
        fake.wait_until(
          lambda: (
            len(calls) - 1 == running.server.frontend.engine_thread.num_queued
          )
        )
      for path, body in BODIES.values():
        for stream in (False, True):
          status, headers, text = client.ask(
            'POST', path, {**body, 'stream': stream}
          )
          error = json.loads(text)['error']
          assert status == 429 and error['type'] == 'rate_limit_error'
          assert re.search(
            r'max_waiting_tokens=4; try again in [\d.]+ s\.$', error['message']
          )
          assert 'retry-after' not in headers
    finally:
      runners[0].open()
    assert [len(fake.take(call)) for call in calls] == [16, 16]
    assert client.serves()


def test_a_list_of_prompts_does_not_hold_up_other_calls(
  folder: pathlib.Path,
) -> None:
  runners: list[fake.GatedRunner] = []

  def make_runner(*args: int) -> fake.GatedRunner:
    runners.append(fake.GatedRunner(*args))
    return runners[0]

  with behind_smg.serve(
    folder, engine={'runner': make_runner, 'max_num_seqs': 1}
  ) as (
    running,
    client,
  ):
    begun: list[str] = []
    add = running.engine.add

    def spy(request: types.Request) -> None:
      begun.append(request.request_id.partition('-')[0])
      add(request)

    running.engine.add = spy  # type: ignore[method-assign]
    with contextlib.ExitStack() as stack:
      stack.callback(runners[0].open)
      calls, num_open = [], 0
      for name, num_prompts in (('many', 20), ('one', 1), ('two', 2)):
        calls.append(
          stack.enter_context(
            contextlib.closing(
              http.client.HTTPConnection('127.0.0.1', client.port)
            )
          )
        )
        calls[-1].request(
          'POST',
          '/v1/completions',
          json.dumps({**PROMPT, 'prompt': ['t1 t2'] * num_prompts}),
          {'content-type': 'application/json', 'x-request-id': name},
        )
        num_open += num_prompts
        running.wait_until_open(num_open)
      runners[0].open()
      assert [call.getresponse().status for call in calls] == [200] * 3
    assert len(begun) == 23
    assert 'one' in begun[:4] and begun[:8].count('two') == 2


def test_a_body_too_long_is_refused(folder: pathlib.Path) -> None:
  with behind_smg.serve(
    folder, limits=limits_lib.Limits(max_message_mib=0.1)
  ) as (
    _,
    client,
  ):
    for size, status in ((50_000, 404), (200_000, 413)):
      assert (
        client.ask('POST', '/v1/completions', {**PROMPT, 'model': 'm' * size})[
          0
        ]
        == status
      )
    assert client.serves()


def test_the_gateway_may_have_a_certificate(
  folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  import ssl
  import subprocess

  subprocess.run(
    [
      'openssl',
      'req',
      '-x509',
      '-newkey',
      'rsa:2048',
      '-nodes',
      '-days',
      '1',
      '-subj',
      '/CN=x',
      '-keyout',
      'key.pem',
      '-out',
      'cert.pem',
    ],
    cwd=tmp_path,
    check=True,
    capture_output=True,
  )
  with behind_smg.serve(
    folder,
    gateway_args=(
      '--tls-cert-path',
      str(tmp_path / 'cert.pem'),
      '--tls-key-path',
      str(tmp_path / 'key.pem'),
    ),
  ) as (running, client):
    gateway = running.server._gateway
    assert gateway is not None and gateway.is_serving
    assert 'CERTIFICATE' in ssl.get_server_certificate(
      ('127.0.0.1', client.port)
    )


def test_nothing_is_left(served: tuple[fake.RunningServer, Client]) -> None:
  running, _ = served
  running.assert_nothing_is_left()
