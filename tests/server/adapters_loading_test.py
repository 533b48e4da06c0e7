# SPDX-License-Identifier: Apache-2.0
"""Adapters come and go while the server serves, for administrators alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import functools
import pathlib
from typing import Any

import grpc
import pytest

from sarathi_jax import errors
from sarathi_jax.server import sarathi_pb2 as pb
from sarathi_jax.server import sarathi_pb2_grpc
from sarathi_jax.server.protocols import control_v1
from tests.server import fake
from tests.server import http_client

LOAD, UNLOAD = '/v1/load_lora_adapter', '/v1/unload_lora_adapter'


def _read(name: str, path: str) -> dict[str, str]:
  if path == 'bad':
    raise errors.CheckpointError(f'{path}: holds no adapter_config.json.')
  return {'path': path}


@pytest.fixture
def make(
  chat_folder: pathlib.Path, tmp_path: pathlib.Path
) -> Iterator[Callable[..., fake.RunningServer]]:
  with contextlib.ExitStack() as stack:

    def make(**config: Any) -> fake.RunningServer:
      running = fake.RunningServer(
        functools.partial(
          fake.make_engine, tokenizer_folder=chat_folder, max_loras=1
        ),
        hooks=control_v1.Hooks(read_adapter=_read),
        http_port=0,
        **config,
      )
      stack.callback(running.close)
      return running

    yield make


def _control(running: fake.RunningServer) -> Any:
  return sarathi_pb2_grpc.ControlStub(running.channel)


def _loaded(running: fake.RunningServer) -> list[tuple[str, int]]:
  found = _control(running).ListAdapters(pb.ListAdaptersRequest()).adapters
  return [(one.name, one.generation) for one in found]


def _refusal(call: Callable[[], Any]) -> tuple[grpc.StatusCode, str]:
  with pytest.raises(grpc.RpcError) as caught:
    call()
  return caught.value.code(), caught.value.details()


def test_control(make: Callable[..., fake.RunningServer]) -> None:
  running = make()
  control = _control(running)

  def load(**fields: Any) -> None:
    control.LoadAdapter(pb.LoadAdapterRequest(**fields))

  def unload(name: str) -> None:
    control.UnloadAdapter(pb.UnloadAdapterRequest(name=name))

  load(name='a', path='x')
  load(name='b', path='y')
  assert _loaded(running) == [('a', 0), ('b', 0)]
  call = running.generate(
    token_ids=[1, 2], sampling={'max_tokens': 3}, adapter='b'
  )
  assert fake.take(call) == [3, 4, 5]
  load(name='b', path='z', replace=True)
  assert _loaded(running) == [('a', 0), ('b', 1)]
  assert running.engine.adapters.find('b').matrices == {'path': 'z'}
  unload('b')
  load(name='b', path='y')
  assert _loaded(running) == [('a', 0), ('b', 2)]
  unload('a')
  invalid, missing = (
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
  )
  for change, code, says in (
    (lambda: load(name='b', path='y'), invalid, "name='b': is loaded already"),
    (lambda: load(name='c', path='bad'), invalid, 'holds no adapter_config'),
    (lambda: load(name='', path='y'), invalid, "name='': must not be empty"),
    (lambda: load(name='c'), invalid, "path='': must not be empty"),
    (lambda: load(name='counting', path='y'), invalid, "the model's own name"),
    (lambda: unload('a'), missing, "adapter='a': must be one"),
  ):
    got, details = _refusal(change)
    assert got is code and says in details
  assert _loaded(running) == [('b', 2)]
  running.assert_nothing_is_left()


def test_paths_of_vllm(make: Callable[..., fake.RunningServer]) -> None:
  running = make()
  client = http_client.Client.of(running)
  body = {'lora_name': 'a', 'lora_path': 'x'}
  assert client.json(LOAD, body) == (
    200,
    {'message': "Success: LoRA adapter 'a' added successfully."},
  )
  assert client.json(LOAD, body)[0] == 400
  assert client.json(LOAD, {**body, 'load_inplace': True})[0] == 200
  assert _loaded(running) == [('a', 1)]
  path, ask = http_client.BODIES['text']
  assert client.json(path, {**ask, 'model': 'a'})[1]['model'] == 'a'
  for change, status, says in (
    ((LOAD, {'lora_name': 'b', 'lora_path': 'bad'}), 400, 'bad: holds no'),
    ((LOAD, {'lora_name': 'b'}), 400, "lora_path='': must not be empty"),
    ((LOAD, {'lora_name': 1, 'lora_path': 'x'}), 400, 'lora_name=1: must be'),
    ((LOAD, {**body, 'x': 1}), 400, 'x=1: this server does not know'),
    ((UNLOAD, {'lora_name': 'b'}), 404, "adapter='b': must be one"),
  ):
    got, told = client.json(*change)
    assert got == status and says in str(told)
  assert client.json(UNLOAD, {'lora_name': 'a'})[0] == 200
  assert _loaded(running) == []
  assert client.json(path, {**ask, 'model': 'a'})[0] == 404


def test_what_went_for_others_is_read_again(
  make: Callable[..., fake.RunningServer],
) -> None:
  """As of vLLM: a request names it, and waits; nobody loads it anew."""
  running = make()
  running.engine.adapters.limit(1)
  client = http_client.Client.of(running)
  control = _control(running)
  for name in ('a', 'b', 'c'):
    control.LoadAdapter(pb.LoadAdapterRequest(name=name, path=f'of {name}'))
  assert _loaded(running) == [('c', 0)]
  path, ask = http_client.BODIES['text']
  assert client.json(path, {**ask, 'model': 'a'})[1]['model'] == 'a'
  assert _loaded(running) == [('a', 1)]
  assert running.engine.adapters.find('a').matrices == {'path': 'of a'}
  call = running.generate(
    token_ids=[1, 2], sampling={'max_tokens': 3}, adapter='b'
  )
  assert fake.take(call) == [3, 4, 5]
  assert _loaded(running) == [('b', 1)]
  assert running.engine.info.adapters == ('b', 'c', 'a')
  code, says = _refusal(
    lambda: control.LoadAdapter(pb.LoadAdapterRequest(name='c', path='x'))
  )
  assert code is grpc.StatusCode.INVALID_ARGUMENT and 'is loaded' in says
  control.UnloadAdapter(pb.UnloadAdapterRequest(name='c'))
  assert client.json(path, {**ask, 'model': 'c'})[0] == 404
  running.assert_nothing_is_left()


def test_what_cant_be_read_again_tells_no_paths(
  make: Callable[..., fake.RunningServer], monkeypatch: pytest.MonkeyPatch
) -> None:
  running = make()
  running.engine.adapters.limit(1)
  control = _control(running)
  for name in ('a', 'b'):
    control.LoadAdapter(pb.LoadAdapterRequest(name=name, path=f'/of/{name}'))
  missing = errors.CheckpointError('/of/a: no such folder.')
  away = running.engine.adapters._away
  monkeypatch.setitem(away, 'a', lambda: (_ for _ in ()).throw(missing))
  path, ask = http_client.BODIES['text']
  status, told = http_client.Client.of(running).json(
    path, {**ask, 'model': 'a'}
  )
  assert status == 404 and '/of' not in str(told)
  code, says = _refusal(
    lambda: fake.take(running.generate(token_ids=[1], adapter='a'))
  )
  assert code is grpc.StatusCode.NOT_FOUND
  assert says == "adapter='a': can't be read again; see the log of the server."
  running.assert_nothing_is_left()


def test_administrators_alone(
  make: Callable[..., fake.RunningServer], tmp_path: pathlib.Path
) -> None:
  tokens = tmp_path / 'tokens'
  tokens.write_text('boss secret1 admin\nann secret2\n')
  running = make(auth_tokens=tokens)
  client = http_client.Client.of(running)
  body = {'lora_name': 'a', 'lora_path': 'x'}
  for token, status in (('secret2', 403), ('secret1', 200)):
    got, _, _ = client.ask('POST', LOAD, body, authorization=f'Bearer {token}')
    assert got == status
  assert client.ask('POST', LOAD, body)[0] == 401
  assert running.engine.adapters.names == ('a',)


def test_nobody_where_there_is_no_control(
  make: Callable[..., fake.RunningServer],
) -> None:
  client = http_client.Client.of(make(control=False))
  assert client.json(LOAD, {'lora_name': 'a', 'lora_path': 'x'})[0] == 404


def test_the_metric_is_vllms(
  make: Callable[..., fake.RunningServer],
) -> None:
  running = make(metrics_port=0, metrics_prefix='vllm')
  for name in ('a', 'b'):
    _control(running).LoadAdapter(pb.LoadAdapterRequest(name=name, path='x'))
  calls = [
    running.generate(token_ids=[i], sampling={'max_tokens': 100}, adapter=name)
    for i, name in enumerate('ab')
  ]
  port = running.server.telemetry.metrics_port
  assert port is not None
  _, _, text = http_client.Client(port).ask('GET', '/metrics')
  (line,) = [
    line
    for line in text.splitlines()
    if line.startswith('vllm:lora_requests_info{')
  ]
  for label in ('max_lora="1"', 'running_lora_adapters="', 'waiting_lora'):
    assert label in line
  assert float(line.rpartition(' ')[2]) > 1e9
  assert all(len(fake.take(call)) == 100 for call in calls)
