# SPDX-License-Identifier: Apache-2.0
"""Two processes, two devices each, serve one model; one of them is lost."""

from __future__ import annotations

from collections.abc import Iterator
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

import grpc
import numpy as np
import pytest

from checkpoints_convert import convert
from sarathi_jax import LLM
from sarathi_jax import EngineConfig
from sarathi_jax import SamplingParams
from sarathi_jax.runner import joining
from sarathi_jax.server import sarathi_pb2 as pb
from sarathi_jax.server import sarathi_pb2_grpc
from tests import naive
from tests import source_tree
from tests.checkpoints_convert import fake_checkpoint as fake
from tests.checkpoints_convert import lora_test

# Tokens of an output: each takes both hosts a round of messages.
NUM_NEW = 8
# What both hosts keep of a request: nothing, what adjusts its logits, and those
# that wait for masks.
SAMPLING: tuple[dict[str, Any], ...] = (
  {},
  dict(
    frequency_penalty=1.5,
    repetition_penalty=1.25,
    logit_bias={3: 2.0},
    min_tokens=NUM_NEW,
  ),
  dict(structured_outputs={'regex': '(t1|t22|t3)+'}),
)
PROMPTS = ([1, 2, 3], [7] * 20, [5, 9] * 6)
PAGE_SIZE = 8
ENGINE = dict(token_budget=4, max_num_seqs=4, page_size=PAGE_SIZE, num_pages=32)
TIMEOUT_S = 240.0


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp('model')
  convert.convert(fake.llama(folder / 'hf'), folder / 'out')
  words = naive.make_tokenizer(fake.VOCAB).to_json()
  (folder / 'out' / 'tokenizer.json').write_text(words)
  return folder / 'out'


class Hosts:
  """Two processes on this machine that play two hosts.

  Args:
    args: a main's module, and its flags.
    by_slurm: whether they are told by SLURM who they are.
    script: what the second one runs instead of the module.
  """

  def __init__(
    self, *args: str, by_slurm: bool = False, script: str = ''
  ) -> None:
    self.printed = ['', '']
    self._coordinator = f'127.0.0.1:{joining.free_port()}'
    self._by_slurm = by_slurm
    self._script = script
    # Where they find the same key; not the developer's own.
    self._home = tempfile.TemporaryDirectory()
    self.processes = [self._start(i, args) for i in range(2)]
    self._readers = [
      threading.Thread(target=self._read, args=(i,)) for i in range(2)
    ]
    for reader in self._readers:
      reader.start()

  def _start(
    self,
    process_id: int,
    args: tuple[str, ...],
  ) -> subprocess.Popen[str]:
    env = {
      'JAX_NUM_CPU_DEVICES': '2',
      'PYTHONUNBUFFERED': '1',
      'JAX_PLATFORMS': 'cpu',
      'HOME': self._home.name,
    }
    if self._by_slurm:  # As SLURM would for a task a node.
      joins = ['--distributed']
      env |= {
        'SLURM_JOB_ID': str(os.getpid()),
        'SLURM_NTASKS': '2',
        'SLURM_STEP_NODELIST': 'localhost',
        'SLURM_LOCALID': '0',
        'SLURM_PROCID': str(process_id),
      }
    else:
      joins = [
        f'--coordinator_address={self._coordinator}',
        '--num_processes=2',
        f'--process_id={process_id}',
      ]
    return subprocess.Popen(
      [
        sys.executable,
        *(
          ('-c', self._script)
          if process_id and self._script
          else ('-m', args[0])
        ),
        *args[1:],
        '--tp=2',
        '--pp=2',
        '--cache_dir=',
        *(f'--{name}={value}' for name, value in ENGINE.items()),
        *joins,
      ],
      cwd=source_tree.ROOT,
      text=True,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      env=os.environ | env,
    )

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
    self._home.cleanup()


@pytest.fixture
def served(checkpoint: pathlib.Path) -> Iterator[tuple[Hosts, grpc.Channel]]:
  hosts = Hosts('sarathi_jax.server', f'--checkpoint={checkpoint}', '--port=0')
  try:
    port = hosts.wait_for(r'Serving \S+ at 127\.0\.0\.1:(\d+)\.')[1]
    with grpc.insecure_channel(f'127.0.0.1:{port}') as channel:
      yield hosts, channel
  finally:
    hosts.close()


def _generate(
  channel: grpc.Channel,
  prompt: list[int],
  max_tokens: int,
  *,
  num_found: int | None = None,
  **sampling: Any,
) -> list[int]:
  """Returns an output; `num_found` tokens of its prompt are in the cache."""
  stub = sarathi_pb2_grpc.SarathiStub(channel)
  tokens: list[int] = []
  for response in stub.Generate(
    pb.GenerateRequest(
      token_ids=pb.TokenIds(ids=prompt),
      sampling=pb.SamplingParams(
        temperature=0, ignore_eos=True, max_tokens=max_tokens, **sampling
      ),
    ),
    timeout=TIMEOUT_S,
  ):
    tokens += response.token_ids
  if num_found is not None:
    assert response.finished.usage.cached_tokens == num_found
  return tokens


def _check_logprobs(llm: LLM, channel: grpc.Channel) -> None:
  asked = dict(
    logprobs=3, prompt_logprobs=2, logprob_token_ids=(5,), max_tokens=4
  )
  (done,) = llm.generate([PROMPTS[-1]], SamplingParams(temperature=0, **asked))
  stub = sarathi_pb2_grpc.SarathiStub(channel)
  request = pb.GenerateRequest(
    token_ids=pb.TokenIds(ids=PROMPTS[-1]),
    sampling=pb.SamplingParams(temperature=0, **asked),
  )
  responses = list(stub.Generate(request, timeout=TIMEOUT_S))
  for name in ('told', 'prompt_logprobs'):
    got = [at for response in responses for at in getattr(response, name)]
    for at, other in zip(got, getattr(done, name), strict=True):
      assert tuple(at.token_ids) == other.token_ids and at.rank == other.rank
      np.testing.assert_allclose(at.logprobs, other.logprobs, atol=1e-4)


def test_two_hosts_serve_what_one_device_does_and_end_together(
  served, checkpoint
):
  hosts, channel = served
  llm = LLM.from_checkpoint(checkpoint, config=EngineConfig(**ENGINE))
  outputs = []
  for i, sampling in enumerate(SAMPLING):
    done = llm.generate(
      PROMPTS,
      SamplingParams(
        temperature=0, ignore_eos=True, max_tokens=NUM_NEW, **sampling
      ),
    )
    outputs.append([one.token_ids for one in done])
    for prompt, expected in zip(PROMPTS, outputs[-1], strict=True):
      # From the second time on, in the prefix cache, on both hosts.
      # All but a token, and what is not a fourth of a page.
      rest = (len(prompt) - 1) % PAGE_SIZE
      num_found = len(prompt) - 1 - (rest if rest < PAGE_SIZE // 4 else 0)
      num_found = num_found if i else None
      got = _generate(channel, prompt, NUM_NEW, num_found=num_found, **sampling)
      assert tuple(got) == expected
  _check_logprobs(llm, channel)
  assert outputs[0] != outputs[1]
  assert {t for tokens in outputs[2] for t in tokens} <= {1, 22, 3}
  # Wherever it arrives; JAX would keep it from the second one.
  hosts.processes[1].send_signal(signal.SIGTERM)
  assert [p.wait(60) for p in hosts.processes] == [0, 0], hosts.printed


def test_a_lost_host_ends_the_service_at_once(served):
  hosts, channel = served
  _generate(channel, [1], 2)
  stub = sarathi_pb2_grpc.SarathiStub(channel)
  calls = [
    stub.Generate(
      pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=[1]),
        sampling=pb.SamplingParams(
          temperature=0, ignore_eos=True, max_tokens=60
        ),
      ),
      timeout=TIMEOUT_S,
    )
    for _ in range(8)
  ]
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


@pytest.mark.slow  # JAX's own client ends them, too.
def test_the_others_end_when_the_first_one_is_lost(served):
  hosts, _ = served
  hosts.processes[0].kill()
  # JAX's own client of the first process may notice it before, and abort.
  assert hosts.processes[1].wait(30) in (1, -signal.SIGABRT)


# The first step is of nothing, before there are requests.
_FAILS = """
import runpy
import sys
from sarathi_jax.runner import device_runner
compute = device_runner.DeviceRunner._compute
num_steps = 0

def fails(*args):
  global num_steps
  num_steps += 1
  if num_steps == 3:
    raise RuntimeError('the device is on fire')
  return compute(*args)

device_runner.DeviceRunner._compute = fails
sys.argv[0] = 'server'
runpy.run_module('sarathi_jax.server', run_name='__main__', alter_sys=True)
"""


def test_an_exception_on_one_host_ends_all_with_its_words(checkpoint):
  hosts = Hosts(
    'sarathi_jax.server',
    f'--checkpoint={checkpoint}',
    '--port=0',
    script=_FAILS,
  )
  try:
    port = hosts.wait_for(r'Serving \S+ at 127\.0\.0\.1:(\d+)\.')[1]
    with (
      grpc.insecure_channel(f'127.0.0.1:{port}') as channel,
      pytest.raises(grpc.RpcError) as caught,
    ):
      _generate(channel, [1], 50)
    start = time.monotonic()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert [p.wait(30) for p in hosts.processes] == [1, 1], hosts.printed
    assert time.monotonic() - start < 10
  finally:
    hosts.close()
  line = 'RuntimeError: the device is on fire'
  assert hosts.printed[0].splitlines()[-1] == (
    f'error: process 1 failed: {line}'
  )
  assert hosts.printed[1].splitlines()[-1] == f'error: {line}'


@pytest.mark.slow
def test_an_offline_run_on_two_hosts_that_slurm_started(
  checkpoint: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  """Where they are is detected; the second one writes nothing."""
  prompts, output = tmp_path / 'in.jsonl', tmp_path / 'out.jsonl'
  prompts.write_text('{"prompt_token_ids": [1, 2, 3]}\n' * 3)
  hosts = Hosts(
    'sarathi_jax.offline',
    f'--checkpoint={checkpoint}',
    f'--prompts={prompts}',
    f'--output={output}',
    '--max_tokens=5',
    by_slurm=True,
  )
  try:
    assert [p.wait(TIMEOUT_S) for p in hosts.processes] == [0, 0], hosts.printed
  finally:
    hosts.close()
  assert len(output.read_text().splitlines()) == 3
  assert 'requests' in hosts.printed[0] and 'requests' not in hosts.printed[1]


@pytest.mark.slow
def test_adapters_reach_all_hosts(
  checkpoint: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  """Both stages, and both devices of each: the tokens are one device's."""
  of = {
    module: (0.2 * a, 0.2 * b)
    for module, (a, b) in lora_test.matrices(lora_test.RANKS_OF_LAYERS).items()
  }
  adapter = lora_test.write(tmp_path / 'adapter', of)
  prompts, output = tmp_path / 'in.jsonl', tmp_path / 'out.jsonl'
  prompts.write_text(
    ''.join(
      json.dumps({'prompt_token_ids': prompt} | more) + '\n'
      for prompt in PROMPTS
      for more in ({}, {'adapter': 'one'})
    )
  )
  hosts = Hosts(
    'sarathi_jax.offline',
    f'--checkpoint={checkpoint}',
    f'--prompts={prompts}',
    f'--output={output}',
    f'--lora_modules=one={adapter}',
    '--max_loras=2',
    f'--max_lora_rank={lora_test.RANK}',
    '--max_tokens=8',
    '--temperature=0',
    '--ignore_eos',
  )
  try:
    assert [p.wait(TIMEOUT_S) for p in hosts.processes] == [0, 0], hosts.printed
  finally:
    hosts.close()
  llm = LLM.from_checkpoint(
    checkpoint, config=EngineConfig(**ENGINE), adapters={'one': adapter}
  )
  done = llm.generate(
    [prompt for prompt in PROMPTS for _ in range(2)],
    SamplingParams(temperature=0, ignore_eos=True, max_tokens=8),
    adapter=[None, 'one'] * len(PROMPTS),
  )
  lines = [json.loads(line) for line in output.read_text().splitlines()]
  assert [tuple(line['token_ids']) for line in lines] == [
    one.token_ids for one in done
  ]
  assert done[0].token_ids != done[1].token_ids
