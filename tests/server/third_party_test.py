# SPDX-License-Identifier: Apache-2.0
"""Clients that others wrote, unmodified, each in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator
import json
import pathlib
import re
import signal
import socket
import subprocess
import sys
from typing import Any

import psutil
import pytest

from tests.server import fake
from tests.server import process_test

_CLIENTS = pathlib.Path(__file__).parent / 'clients'
_ROOT = pathlib.Path(__file__).parents[2]


def _drive(client: str, port: int) -> Any:
  done = subprocess.run(
    [sys.executable, '-I', _CLIENTS / f'{client}.py', str(port)],
    check=False,
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)


def test_triton(server: fake.RunningServer) -> None:
  got = _drive('triton', server.server.port)
  assert got['live'] and got['ready'] and got['model_ready']
  assert got['metadata']['name'] == 'counting'
  assert got['config']['config']['model_transaction_policy']['decoupled']
  assert got['statistics']['model_stats'][0]['name'] == 'counting'
  assert got['index']['models'][0]['state'] == 'READY'
  assert got['text'].split() == ['t3', 't4', 't5'] and got['ids'] == [3, 4, 5]
  assert got['streamed'].split() == ['t6', 't7', 't8', 't9', 't10', 't11']
  assert 'temperature' in got['stream_error']
  assert got['unknown_model'] == 'StatusCode.NOT_FOUND'
  assert server.is_alive()


def test_reflection_and_health(server: fake.RunningServer) -> None:
  got = _drive('reflection', server.server.port)
  assert {
    'sarathi.v1.Sarathi',
    'sarathi.v1.Control',
    'vllm.grpc.engine.VllmEngine',
    'inference.GRPCInferenceService',
    'grpc.health.v1.Health',
  } <= set(got['services'])
  assert set(got['statuses'].values()) == {1}  # SERVING
  assert got['tokens'] == [3, 4, 5]


def _serve(folder: pathlib.Path, *args: str) -> process_test.Process:
  return process_test.Process(
    '-m',
    'sarathi_jax.server',
    f'--checkpoint={_ROOT / "sarathi_jax/quickstart/model"}',
    f'--config={_ROOT / "configs/quickstart.py"}',
    '--token_budget=16',
    '--served_model_name=quickstart',
    '--port=0',
    f'--cache_dir={folder}',
    *args,
  )


@pytest.fixture(scope='module')
def cache(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  return tmp_path_factory.mktemp('cache')


@pytest.fixture(scope='module')
def gateway(cache: pathlib.Path) -> Iterator[tuple[process_test.Process, int]]:
  """The quickstart model behind the gateway, and the port of that.

  Our own HTTP is at a port that it prints.
  """
  port = fake.free_port()
  process = _serve(cache, f'--gateway_port={port}', '--http_port=0')
  try:
    process.read_until('Serving quickstart')
    yield process, port
  finally:
    process.close()


@pytest.mark.slow
@pytest.mark.parametrize('is_ours', [False, True])
def test_openai(
  gateway: tuple[process_test.Process, int], is_ours: bool
) -> None:
  process, port = gateway
  if is_ours:
    port = int(process.read_until(r"OpenAI's HTTP: \S+:(\d+)/v1")[1])
  got = _drive('openai_http', port)
  assert got['model'] == 'quickstart'
  assert got['chat'] == 'Return the number of items in a container.'
  assert got['chat_stream'] == got['chat']
  assert got['chat_finish'] == 'stop'
  assert got['chat_usage']['prompt_tokens'] == 7
  assert got['chat_usage']['completion_tokens'] == 10
  assert got['chat_stream_usage'] == 10
  assert got['completion'].startswith(' iterate over the elements of')
  assert got['completion_stream'] == got['completion']
  assert got['seeded'][0] == got['seeded'][1] != got['completion']
  assert got['stopped'] == ' iterate over the'
  assert got['stopped_finish'] == 'stop'
  for name, (status, message) in got['refused'].items():
    assert status == 400 and name in message
  assert set(got['refused']) == {
    'frequency_penalty',
    'n',
    'logprobs',
    'temperature',
  }
  tokens, logprobs = zip(*got['logprobs'], strict=True)
  assert ''.join(tokens).startswith(got['chat'])
  assert all(-5 < p <= 0 for p in logprobs) and len(set(logprobs)) > 5
  for chosen, top in zip(got['logprobs'], got['top_logprobs'], strict=True):
    assert len(top) == 3 and chosen == top[0]  # greedy
  told = got['scored']
  if not is_ours:
    assert told is None  # smg drops it.
    return
  assert ''.join(told['tokens']) == got['echoed']
  assert told['token_logprobs'][0] is told['top_logprobs'][0] is None
  for token, logprob, top in list(
    zip(
      told['tokens'], told['token_logprobs'], told['top_logprobs'], strict=True
    )
  )[1:]:
    assert top[token] == logprob <= max(top.values()) and len(top) in (2, 3)


@pytest.mark.slow
def test_a_gateway_that_is_killed_is_started_again(
  gateway: tuple[process_test.Process, int],
) -> None:
  process, port = gateway
  (child,) = psutil.Process(process.process.pid).children()
  child.send_signal(signal.SIGKILL)
  child.wait(fake.TIMEOUT_S)
  fake.wait_until(
    lambda: psutil.Process(process.process.pid).children() != [], timeout_s=60
  )

  def serves() -> bool:
    try:
      _drive('openai_http', port)
    except AssertionError:
      return False
    return True

  fake.wait_until(serves, timeout_s=60)


@pytest.mark.slow
def test_two_replicas_survive_the_death_of_one(cache: pathlib.Path) -> None:
  port = fake.free_port()
  second = _serve(cache)
  first = None
  try:
    address = re.sub(
      r'\s',
      '',
      second.read_until(r'Serving quickstart at (127\.0\.0\.1:\d+)\.')[1],
    )
    first = _serve(cache, f'--gateway_port={port}', f'--replicas={address}')
    first.read_until('Serving quickstart')
    _drive('openai_http', port)
    second.process.kill()
    second.process.communicate()
    _drive('openai_http', port)  # retried by the gateway, seen by nobody
    first.process.send_signal(signal.SIGTERM)
    code, err = first.end(within_s=30)
    assert code == 0 and 'Traceback' not in err
  finally:
    for process in filter(None, (first, second)):
      process.close()
  with pytest.raises(ConnectionRefusedError):
    socket.create_connection(('127.0.0.1', port)).close()
