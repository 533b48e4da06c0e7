# SPDX-License-Identifier: Apache-2.0
"""Requests name adapters over every protocol that has a place for it."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import functools
import json
import pathlib
from typing import Any

import grpc
import pytest

from sarathi_jax.server import open_inference_pb2 as oip
from sarathi_jax.server import open_inference_pb2_grpc
from sarathi_jax.server import sarathi_pb2 as pb
from tests.server import fake
from tests.server import http_client


@pytest.fixture(scope='module')
def running(chat_folder: pathlib.Path) -> Iterator[fake.RunningServer]:
  """With two adapters, of which a step may have one."""
  with contextlib.closing(
    fake.RunningServer(
      functools.partial(
        fake.make_engine,
        tokenizer_folder=chat_folder,
        adapters={'blue': {}, 'red': {}},
        max_loras=1,
      ),
      http_port=0,
    )
  ) as running:
    yield running


@pytest.fixture
def client(running: fake.RunningServer) -> http_client.Client:
  return http_client.Client.of(running)


@pytest.mark.parametrize('kind', http_client.BODIES)
def test_the_model_is_the_adapter(
  client: http_client.Client, kind: str
) -> None:
  path, body = http_client.BODIES[kind]
  for name in ('blue', 'red', 'counting'):
    status, whole = client.json(path, {**body, 'model': name})
    assert (status, whole['model']) == (200, name)
    first, *_ = client.events(path, {**body, 'model': name})
    assert first['model'] == name
  status, told = client.json(path, {**body, 'model': 'green'})
  assert status == 404
  assert "model='green': is not served here; 'counting', 'blue'" in str(told)


def test_models_are_listed_with_their_parent(
  client: http_client.Client,
) -> None:
  _, _, text = client.ask('GET', '/v1/models')
  models = {model['id']: model for model in json.loads(text)['data']}
  assert list(models) == ['counting', 'blue', 'red']
  assert [m.get('parent') for m in models.values()] == [
    None,
    'counting',
    'counting',
  ]
  status, _, text = client.ask('GET', '/v1/models/red')
  assert status == 200 and json.loads(text) == models['red']
  assert client.json('/tokenize', {'model': 'red', 'prompt': 't1'})[0] == 200


def test_sarathi_v1(running: fake.RunningServer) -> None:
  info = running.stub.GetModelInfo(pb.GetModelInfoRequest())
  assert info.adapters == ['blue', 'red']
  sampling = {'max_tokens': 3}
  calls = [
    running.generate(token_ids=[1, 2], sampling=sampling, **named)
    for named in ({'adapter': 'blue'}, {}, {'adapter': 'red'})
  ]
  assert [fake.take(call) for call in calls] == [[3, 4, 5]] * 3
  call = running.generate(token_ids=[1], adapter='green')
  assert fake.code_of(call) is grpc.StatusCode.NOT_FOUND
  assert call.details() == (
    "adapter='green': must be one that is loaded: 'blue', 'red'."
  )
  running.assert_nothing_is_left()


def test_open_inference(running: fake.RunningServer) -> None:
  stub: Any = open_inference_pb2_grpc.GRPCInferenceServiceStub(running.channel)
  for name, is_ready in (('red', True), ('green', False)):
    assert stub.ModelReady(oip.ModelReadyRequest(name=name)).ready == is_ready
  found = stub.RepositoryIndex(oip.RepositoryIndexRequest())
  assert [model.name for model in found.models] == ['counting', 'blue', 'red']
  metadata = stub.ModelMetadata(oip.ModelMetadataRequest(name='red'))
  assert metadata.name == 'red'
  request = oip.ModelInferRequest(model_name='red')
  request.inputs.add(
    name='input_ids',
    datatype='INT64',
    shape=[1, 2],
    contents=oip.InferTensorContents(int64_contents=[1, 2]),
  )
  assert stub.ModelInfer(request).model_name == 'red'


def test_many_adapters_and_few_slots(running: fake.RunningServer) -> None:
  """Nobody waits for ever, and who needs none waits for nobody."""
  calls = [
    running.generate(
      token_ids=[i], sampling={'max_tokens': 20}, adapter=('blue', 'red')[i % 2]
    )
    for i in range(12)
  ]
  plain = running.generate(token_ids=[7], sampling={'max_tokens': 3})
  assert fake.take(plain) == [8, 9, 10]
  for i, call in enumerate(calls):
    assert fake.take(call) == list(range(i + 1, i + 21))
  running.assert_nothing_is_left()
