# SPDX-License-Identifier: Apache-2.0
"""Two processes, two devices each, serve one model; one of them is lost."""

from __future__ import annotations

from collections.abc import Iterator
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import grpc
import pytest

from checkpoints_convert import convert
from sarathi_jax import LLM
from sarathi_jax import EngineConfig
from sarathi_jax import SamplingParams
from sarathi_jax.server import sarathi_pb2 as pb
from sarathi_jax.server import sarathi_pb2_grpc
from tests import source_tree
from tests.checkpoints_convert import fake_checkpoint as fake

PROMPTS = ([1, 2, 3], [7] * 20, [5, 9] * 6)
ENGINE = dict(token_budget=4, max_num_seqs=4, page_size=8, num_pages=32)
TIMEOUT_S = 240.0


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp('model')
  convert.convert(fake.llama(folder / 'hf'), folder / 'out')
  return folder / 'out'


def _free_port() -> int:
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    port: int = probe.getsockname()[1]
    return port


class Hosts:
  """Two processes on this machine that play two hosts."""

  def __init__(self, *args: str, by_slurm: bool = False) -> None:
    self.printed = ['', '']
    self._coordinator = f'127.0.0.1:{_free_port()}'
    self._by_slurm = by_slurm
    self.processes = [self._start(i, args) for i in range(2)]
    self._readers = [
      threading.Thread(target=self._read, args=(i,)) for i in range(2)]
    for reader in self._readers:
      reader.start()

  def _start(self, process_id: int, args: tuple[str, ...],
             ) -> subprocess.Popen[str]:
    env = {'JAX_NUM_CPU_DEVICES': '2', 'PYTHONUNBUFFERED': '1',
           'JAX_PLATFORMS': 'cpu'}
    if self._by_slurm:  # As SLURM would for a task a node.
      joins = ['--distributed']
      env |= {'SLURM_JOB_ID': str(os.getpid()), 'SLURM_NTASKS': '2',
              'SLURM_STEP_NODELIST': 'localhost', 'SLURM_LOCALID': '0',
              'SLURM_PROCID': str(process_id)}
    else:
      joins = [f'--coordinator_address={self._coordinator}',
               '--num_processes=2', f'--process_id={process_id}']
    return subprocess.Popen(
      [sys.executable, '-m', *args, '--tp=2', '--pp=2', '--cache_dir=',
       *(f'--{name}={value}' for name, value in ENGINE.items()), *joins],
      cwd=source_tree.ROOT, text=True, stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT, env=os.environ | env)

  def _read(self, i: int) -> None:
    for line in self.processes[i].stdout or ():
      self.printed[i] += line

  def wait_for(self, pattern: str) -> re.Match[str]:
    end = time.monotonic() + TIMEOUT_S
    while not (found := re.search(pattern, self.printed[0])):
      assert time.monotonic() < end, self.printed
      assert self.processes[0].poll() is None, self.printed
      time.sleep(0.05)  # There is nothing to wait on but a pipe.
    return found

  def close(self) -> None:
    for process in self.processes:
      process.kill()
      process.wait()
    for reader, process in zip(self._readers, self.processes, strict=True):
      reader.join()
      assert process.stdout
      process.stdout.close()


@pytest.fixture
def served(checkpoint: pathlib.Path) -> Iterator[tuple[Hosts, grpc.Channel]]:
  hosts = Hosts('sarathi_jax.server', f'--checkpoint={checkpoint}', '--port=0')
  try:
    port = hosts.wait_for(r'Serving \S+ at 127\.0\.0\.1:(\d+)\.')[1]
    with grpc.insecure_channel(f'127.0.0.1:{port}') as channel:
      yield hosts, channel
  finally:
    hosts.close()


def _generate(channel: grpc.Channel, prompt: list[int],
              max_tokens: int) -> list[int]:
  stub = sarathi_pb2_grpc.SarathiStub(channel)
  tokens: list[int] = []
  for response in stub.Generate(pb.GenerateRequest(
      token_ids=pb.TokenIds(ids=prompt), sampling=pb.SamplingParams(
        temperature=0, ignore_eos=True, max_tokens=max_tokens)),
      timeout=TIMEOUT_S):
    tokens += response.token_ids
  return tokens


def test_two_hosts_serve_what_one_device_does_and_end_together(
    served, checkpoint):
  hosts, channel = served
  llm = LLM.from_checkpoint(checkpoint, config=EngineConfig(**ENGINE))
  done = llm.generate(
    PROMPTS, SamplingParams(temperature=0, ignore_eos=True, max_tokens=20))
  for prompt, expected in zip(PROMPTS, done, strict=True):
    assert tuple(_generate(channel, prompt, 20)) == expected.token_ids
  hosts.processes[0].send_signal(signal.SIGTERM)
  assert [p.wait(60) for p in hosts.processes] == [0, 0], hosts.printed


def test_a_lost_host_ends_the_service_at_once(served):
  hosts, channel = served
  _generate(channel, [1], 2)
  stub = sarathi_pb2_grpc.SarathiStub(channel)
  calls = [stub.Generate(pb.GenerateRequest(
    token_ids=pb.TokenIds(ids=[1]), sampling=pb.SamplingParams(
      temperature=0, ignore_eos=True, max_tokens=60)), timeout=TIMEOUT_S)
    for _ in range(8)]
  next(iter(calls[0]))
  hosts.processes[1].kill()
  start = time.monotonic()
  codes = []
  for call in calls:
    try:
      for _ in call:
        pass
    except grpc.RpcError as error:
      codes.append(error.code())
  assert time.monotonic() - start < 10
  assert codes and set(codes) == {grpc.StatusCode.UNAVAILABLE}
  assert hosts.processes[0].wait(30) == 1, hosts.printed
  assert 'process 1 of 2 is gone' in hosts.printed[0]


def test_the_others_end_when_the_first_one_is_lost(served):
  hosts, _ = served
  hosts.processes[0].kill()
  # JAX's own client of the first process may notice it before, and abort.
  assert hosts.processes[1].wait(30) in (1, -signal.SIGABRT)


def test_an_offline_run_on_two_hosts_that_slurm_started(
    checkpoint: pathlib.Path, tmp_path: pathlib.Path) -> None:
  """Where they are is detected; the second one writes nothing."""
  prompts, output = tmp_path / 'in.jsonl', tmp_path / 'out.jsonl'
  prompts.write_text('{"prompt_token_ids": [1, 2, 3]}\n' * 3)
  hosts = Hosts(
    'sarathi_jax.offline', f'--checkpoint={checkpoint}',
    f'--prompts={prompts}', f'--output={output}', '--max_tokens=5',
    by_slurm=True)
  try:
    assert [p.wait(TIMEOUT_S) for p in hosts.processes] == [0, 0], (
      hosts.printed)
  finally:
    hosts.close()
  assert len(output.read_text().splitlines()) == 3
  assert 'requests' in hosts.printed[0] and 'requests' not in hosts.printed[1]
