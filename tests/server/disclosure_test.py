# SPDX-License-Identifier: Apache-2.0
"""What is told to whom: no paths of the server, nothing of other requests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import functools
import pathlib
from typing import Any
import urllib.error
import urllib.request

import grpc
from grpc_health.v1 import health_pb2
from grpc_health.v1 import health_pb2_grpc
import pytest
from smg_grpc_proto import vllm_engine_pb2 as vllm
from smg_grpc_proto import vllm_engine_pb2_grpc

from sarathi_jax.launch import loading
from sarathi_jax.server import open_inference_pb2 as oip
from sarathi_jax.server import open_inference_pb2_grpc
from sarathi_jax.server import sarathi_pb2 as pb
from sarathi_jax.server import sarathi_pb2_grpc
from tests.server import fake
from tests.server import http_client


@pytest.fixture(scope='module')
def placed(
  tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[fake.RunningServer, str]]:
  """A server, and the folder that its model comes from."""
  folder = fake.write_tokenizer(tmp_path_factory.mktemp('secret-place'))
  name = loading.served_name(str(folder))
  with contextlib.closing(
    fake.RunningServer(
      functools.partial(
        fake.make_engine, tokenizer_folder=folder, model_name=name
      ),
      metrics_port=0,
      http_port=0,
    )
  ) as running:
    list(running.generate(text='t1'))
    yield running, str(folder)


def _told(running: fake.RunningServer) -> dict[str, str]:
  """Everything that is told of the server, by the call that tells it."""
  triton: Any = open_inference_pb2_grpc.GRPCInferenceServiceStub(
    running.channel
  )
  gateway: Any = vllm_engine_pb2_grpc.VllmEngineStub(running.channel)
  name = running.engine.info.model_name
  told = {
    'GetStats': running.stats(),
    'sarathi GetModelInfo': running.stub.GetModelInfo(pb.GetModelInfoRequest()),
    'vllm GetModelInfo': gateway.GetModelInfo(vllm.GetModelInfoRequest()),
    'GetServerInfo': gateway.GetServerInfo(vllm.GetServerInfoRequest()),
    'GetLoads': gateway.GetLoads(vllm.GetLoadsRequest()),
    'HealthCheck': gateway.HealthCheck(vllm.HealthCheckRequest()),
    'Health': health_pb2_grpc.HealthStub(running.channel).Check(
      health_pb2.HealthCheckRequest()
    ),
    'ServerMetadata': triton.ServerMetadata(oip.ServerMetadataRequest()),
    'ModelMetadata': triton.ModelMetadata(oip.ModelMetadataRequest(name=name)),
    'ModelConfig': triton.ModelConfig(oip.ModelConfigRequest(name=name)),
    'ModelStatistics': triton.ModelStatistics(oip.ModelStatisticsRequest()),
    'RepositoryIndex': triton.RepositoryIndex(oip.RepositoryIndexRequest()),
    'ListRequests': sarathi_pb2_grpc.ControlStub(running.channel).ListRequests(
      pb.ListRequestsRequest()
    ),
    'metrics': _scrape(running.server.telemetry.metrics_port),
  }
  ours = http_client.Client(running.server.http_port or 0)
  for method, path, body in (
    ('GET', '/health', None),
    ('GET', '/v1/models', None),
    ('GET', '/etc/passwd', None),
    ('POST', '/v1/completions', {'prompt': 't1'}),
    ('POST', '/v1/completions', {'model': 'other'}),
    ('POST', '/v1/chat/completions', http_client.CHAT),  # it has no template
  ):
    told[f'{method} {path} {body}'] = str(ours.ask(method, path, body))
  refused = {
    'another model': lambda: triton.ModelInfer(
      oip.ModelInferRequest(model_name='other')
    ),
    'no chat template': lambda: list(
      running.stub.Generate(
        pb.GenerateRequest(
          chat=pb.Chat(messages=[pb.ChatMessage(role='user', content='t1')])
        )
      )
    ),
    'empty': lambda: list(running.generate(token_ids=[])),
  }
  for name, call in refused.items():
    with pytest.raises(grpc.RpcError) as caught:
      call()
    told[name] = caught.value.details()
  return {name: str(text) for name, text in told.items()}


def _scrape(port: int, token: str | None = None) -> str:
  request = urllib.request.Request(f'http://127.0.0.1:{port}/metrics')
  if token is not None:
    request.add_header('Authorization', f'Bearer {token}')
  with urllib.request.urlopen(request, timeout=fake.TIMEOUT_S) as reply:
    text: str = reply.read().decode()
  return text


def test_nobody_is_told_where_the_model_lies(
  placed: tuple[fake.RunningServer, str],
) -> None:
  running, folder = placed
  told = _told(running)
  parent = str(pathlib.Path(folder).parent)
  assert [name for name, text in told.items() if parent in text] == []
  assert pathlib.Path(folder).name in told['metrics']


@pytest.mark.parametrize(
  'checkpoint, name',
  [
    ('{folder}/model', 'model'),
    ('{folder}/model/', 'model'),
    ('{folder}/model/../model/.', 'model'),
    ('org/model', 'org/model'),
  ],
)
def test_a_folder_is_served_by_its_own_name(
  tmp_path: pathlib.Path, checkpoint: str, name: str
) -> None:
  (tmp_path / 'model').mkdir()
  assert loading.served_name(checkpoint.format(folder=tmp_path)) == name


def test_a_fault_tells_nobody_what_was_in_it(gated: Callable[..., Any]) -> None:
  running, runner = gated()
  runner.fault = OSError("/secret/place: of another's prompt")
  runner.is_gone = True
  runner.open()
  for _ in range(2):
    with pytest.raises(grpc.RpcError) as caught:
      list(running.generate(token_ids=[1]))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert 'secret' not in caught.value.details()


@pytest.mark.parametrize(
  'token, code',
  [(None, 401), ('wrong', 401), ('ann-secret', 200), ('ops-secret', 200)],
)
def test_metrics_need_a_token_where_calls_do(
  tmp_path: pathlib.Path, token: str | None, code: int
) -> None:
  tokens = tmp_path / 'tokens'
  tokens.write_text('ann ann-secret\nops ops-secret admin\n')
  with contextlib.closing(
    fake.RunningServer(fake.make_engine, auth_tokens=tokens, metrics_port=0)
  ) as running:
    port = running.server.telemetry.metrics_port
    assert port is not None
    try:
      told = _scrape(port, token)
      assert (code, 'sarathi:engine_up 1.0' in told) == (200, True)
    except urllib.error.HTTPError as error:
      assert error.code == code
      assert b'sarathi' not in error.read()
