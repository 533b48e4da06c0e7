# SPDX-License-Identifier: Apache-2.0
"""The server as a process: what it prints, signals, exit codes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import os
import pathlib
import re
import signal
import subprocess
import sys
from typing import Any

import grpc
import pytest

from sarathi_jax.server import sarathi_pb2 as pb
from tests.server import fake

ROOT = pathlib.Path(__file__).parents[2]


class Process:
  """A server process, and a client of it once it serves."""

  def __init__(self, *args: str) -> None:
    self.process = subprocess.Popen(
      [sys.executable, *args],
      cwd=ROOT,
      text=True,
      env={
        **os.environ,
        'PYTHONUNBUFFERED': '1',
        'HF_HUB_OFFLINE': '1',
        'PYTHONPATH': os.pathsep.join(
          [str(ROOT), os.environ.get('PYTHONPATH', '')]
        ),
      },
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
    )
    self.printed = ''

  def read_until(self, pattern: str) -> re.Match[str]:
    while not (found := re.search(pattern, self.printed)):
      line = self.process.stdout.readline()
      assert line, (self.printed, self.process.stderr.read())
      self.printed += line
    return found

  def connect(self) -> Any:
    port = self.read_until(r'Serving counting at 127\.0\.0\.1:(\d+)\.')[1]
    self.channel = grpc.insecure_channel(f'127.0.0.1:{port}')
    return fake.RunningServer.stub_of(self.channel)

  def end(self, *, within_s: float = fake.TIMEOUT_S) -> tuple[int, str]:
    _, err = self.process.communicate(timeout=within_s)
    return self.process.returncode, err

  def close(self) -> None:
    if self.process.poll() is None:
      self.process.kill()
      self.process.communicate()


@pytest.fixture
def start(tokenizer_folder: pathlib.Path) -> Iterator[Callable[..., Process]]:
  started = []

  def start(*, drain_s: float, loads: bool = True) -> Process:
    started.append(
      Process(
        'tests/server/fake.py',
        '0',
        str(drain_s),
        *([str(tokenizer_folder)] if loads else []),
      )
    )
    return started[-1]

  yield start
  for process in started:
    process.close()


def _generate(stub: Any, max_tokens: int) -> Any:
  return stub.Generate(
    pb.GenerateRequest(
      token_ids=pb.TokenIds(ids=[1]),
      sampling=pb.SamplingParams(max_tokens=max_tokens),
    ),
    timeout=fake.TIMEOUT_S,
  )


def test_tells_what_to_try(start: Callable[..., Process]) -> None:
  server = start(drain_s=1)
  server.connect()
  command = server.read_until(
    r'Try:\n  (\S+ -m sarathi_jax\.client --target=localhost:\d+) "A list is"'
    r'\n'
  )[1]
  client = subprocess.run(
    [*command.split(), 't1 t2'],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
  )
  assert client.stdout.split()[:2] == ['t3', 't4']


def test_sigterm_drains(start: Callable[..., Process]) -> None:
  server = start(drain_s=fake.TIMEOUT_S)
  stub = server.connect()
  call = _generate(stub, 200)
  first = list(next(call).token_ids)
  server.process.send_signal(signal.SIGTERM)
  assert first[0] == 2 and len(first + fake.take(call)) == 200
  assert server.end() == (0, '')


def test_a_drain_ends_in_time(start: Callable[..., Process]) -> None:
  server = start(drain_s=0.1)
  call = _generate(server.connect(), 10**6)
  assert next(call).token_ids[0] == 2
  server.process.send_signal(signal.SIGTERM)
  with pytest.raises(grpc.RpcError):
    list(call)
  assert call.code() is grpc.StatusCode.UNAVAILABLE
  code, err = server.end(within_s=10)
  assert code == 0
  assert 'cut off after 0.1 s' in err and 'Traceback' not in err


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_stops_at_once(
  start: Callable[..., Process], number: signal.Signals
) -> None:
  server = start(drain_s=1000)
  stub = server.connect()
  call = _generate(stub, 10**6)
  assert next(call).token_ids[0] == 2
  server.process.send_signal(number)
  fake.wait_until(lambda: _is_refused(stub))
  server.process.send_signal(number)
  with pytest.raises(grpc.RpcError):
    list(call)
  assert call.code() is grpc.StatusCode.UNAVAILABLE
  assert server.end(within_s=10) == (128 + number, '')


def _is_refused(stub: Any) -> bool:
  call = _generate(stub, 1)
  try:
    list(call)
  except grpc.RpcError:
    return bool(call.code() is grpc.StatusCode.UNAVAILABLE)
  return False


def test_a_signal_while_loading_stops_at_once(
  start: Callable[..., Process],
) -> None:
  server = start(drain_s=1000, loads=False)
  server.read_until('Stuck')
  server.process.send_signal(signal.SIGTERM)
  assert server.end(within_s=10) == (128 + signal.SIGTERM, '')


def _run(*args: str) -> tuple[int, str]:
  """Runs the real command, to an end that comes before it loads a model."""
  server = Process('-m', 'sarathi_jax.server', '--checkpoint=none', *args)
  return server.end()


def test_a_port_in_use_is_one_line(server: fake.RunningServer) -> None:
  port = server.server.port
  code, err = _run(f'--port={port}')
  assert code == 1
  assert err == (
    f"error: port={port}: can't listen at 127.0.0.1:{port}: Address already "
    'in use. Is another server running there? Then choose another --port.\n'
  )
  assert server.is_alive()


def test_a_host_that_is_not_ours_is_one_line() -> None:
  code, err = _run('--host=192.0.2.1')  # kept for documentation: RFC 5737
  assert code == 1
  assert "can't listen at 192.0.2.1:50051: Cannot assign" in err
  assert err.count('\n') == 1


@pytest.mark.parametrize(
  'args, says',
  [
    (('--port=70000',), 'port=70000'),
    (('--policy=random',), "policy='random'"),
    (('--token_budget=4', '--max_num_seqs=8'), 'token_budget=4'),
  ],
)
def test_a_bad_flag_is_one_line(args: tuple[str, ...], says: str) -> None:
  code, err = _run('--port=0', *args)
  assert code == 1
  assert err.startswith(f'error: {says}') and err.count('\n') == 1


def test_a_missing_checkpoint_is_one_line(tmp_path: pathlib.Path) -> None:
  code, err = _run('--port=0', f'--checkpoint={tmp_path / "none"}')
  assert code == 1
  assert err.strip().startswith('error: ') and str(tmp_path / 'none') in err
  assert 'Traceback' not in err
