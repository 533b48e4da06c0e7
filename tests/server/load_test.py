# SPDX-License-Identifier: Apache-2.0
"""Many streams, and a long time: nothing is lost, nothing grows."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
import contextlib
import functools
import gc
import random
import time
from typing import Any

import grpc
import psutil
import pytest

from sarathi_jax.benchmarks import server_front
from sarathi_jax.server import admission
from sarathi_jax.server import sarathi_pb2 as pb
from sarathi_jax.server import sarathi_pb2_grpc
from tests.server import fake

_ME = psutil.Process()


@pytest.fixture
def roomy() -> Iterator[fake.RunningServer]:
  """Scarce pages, so that preemption is in the play, too."""
  with contextlib.closing(fake.RunningServer(
      functools.partial(fake.make_engine, token_budget=64, max_num_seqs=16,
                        num_pages=64),
      limits=admission.Limits(max_waiting=2000))) as running:
    yield running


def _sizes(running: fake.RunningServer) -> tuple[int, int]:
  """(bytes in memory, open files) once all is at rest."""
  fake.wait_until(running.all_pages_are_free)
  gc.collect()
  return _ME.memory_info().rss, _ME.num_fds()


def _assert_nothing_is_left(running: fake.RunningServer) -> None:
  fake.wait_until(running.all_pages_are_free)
  frontend = running.server.frontend
  thread = frontend.engine_thread
  fake.wait_until(lambda: not frontend.num_open)
  assert not (thread._streams or thread._waiting._streams or thread.num_queued
              or frontend._streams or running.engine._live)
  assert running.is_alive()


def test_a_thousand_streams_at_once(roomy: fake.RunningServer) -> None:
  port = roomy.server.port
  for num_streams in (200, 1000):
    # Each checks its own tokens.
    assert len(asyncio.run(_count_up(port, num_streams))) == num_streams
  before, num_files = _sizes(roomy)
  asyncio.run(_count_up(port, 1000))
  after, num_files_after = _sizes(roomy)
  _assert_nothing_is_left(roomy)
  assert after - before < 24 << 20
  assert num_files_after <= num_files + 5


async def _count_up(port: int, num_streams: int) -> list[int]:
  async def one(stub: Any, i: int) -> int:
    tokens: list[int] = []
    async for response in stub.Generate(pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=[i % 64] * (1 + i % 9)),
        sampling=pb.SamplingParams(max_tokens=1 + i % 20))):
      tokens += response.token_ids
    assert tokens == [(i + 1 + k) % 64 for k in range(1 + i % 20)]
    return i

  async with grpc.aio.insecure_channel(f'127.0.0.1:{port}') as channel:
    stub = sarathi_pb2_grpc.SarathiStub(channel)
    return await asyncio.gather(*(one(stub, i) for i in range(num_streams)))


class _Client:
  """Sends requests, of which it gives up some at any phase."""

  def __init__(self, stub: Any, seed: int) -> None:
    self._stub = stub
    self._random = random.Random(seed)
    self.num_done = self.num_left = 0

  async def run(self, deadline: float) -> None:
    while time.monotonic() < deadline:
      await self._one()

  async def _one(self) -> None:
    rng = self._random
    first = rng.randrange(64)
    num_prompt, max_tokens = rng.randint(1, 60), rng.randint(1, 60)
    timeout = rng.choice([None, None, 5.0, 0.005])
    call = self._stub.Generate(pb.GenerateRequest(
      token_ids=pb.TokenIds(ids=[first] * num_prompt), sampling=(
        pb.SamplingParams(max_tokens=max_tokens)),
      priority=rng.randint(-1, 1)), timeout=timeout)
    patience = rng.choice([0, 0.001, 0.01, 0.1, 60, 60, 60])
    stop_after = rng.choice([0, 1, 10, 1000, 1000])
    tokens: list[int] = []

    async def read() -> None:
      async for response in call:
        tokens.extend(response.token_ids)
        if len(tokens) > stop_after:
          return

    try:
      await asyncio.wait_for(read(), patience)
    except TimeoutError:
      pass
    except grpc.aio.AioRpcError as error:
      assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED, error
    assert tokens == [(first + 1 + k) % 64 for k in range(len(tokens))]
    if len(tokens) == max_tokens:
      self.num_done += 1
    else:
      self.num_left += 1
    call.cancel()


async def _soak(port: int, seconds: float, seed: int) -> tuple[int, int]:
  async with grpc.aio.insecure_channel(f'127.0.0.1:{port}') as channel:
    stub = sarathi_pb2_grpc.SarathiStub(channel)
    clients = [_Client(stub, seed + i) for i in range(40)]
    deadline = time.monotonic() + seconds
    await asyncio.gather(*(client.run(deadline) for client in clients))
  return (sum(c.num_done for c in clients), sum(c.num_left for c in clients))


def _check_soak(running: fake.RunningServer, seconds: float) -> None:
  asyncio.run(_soak(running.server.port, seconds / 5, 0))
  before, num_files = _sizes(running)
  done, left = asyncio.run(_soak(running.server.port, seconds, 1000))
  after, num_files_after = _sizes(running)
  assert done > 10 * seconds and left > 10 * seconds
  assert running.engine.stats().num_preemptions > 0
  _assert_nothing_is_left(running)
  assert after - before < 24 << 20
  assert num_files_after <= num_files + 5


def test_random_cancels_for_a_while(roomy: fake.RunningServer) -> None:
  _check_soak(roomy, 5)


@pytest.mark.parametrize('seconds', [
  pytest.param(60, marks=pytest.mark.slow),
  pytest.param(600, marks=pytest.mark.soak)])
def test_random_cancels_for_long(roomy: fake.RunningServer,
                                 seconds: float) -> None:
  _check_soak(roomy, seconds)


def test_the_benchmark_of_the_front_runs() -> None:
  result = server_front.measure(num_streams=20, num_tokens=10, step_s=0.001)
  assert result['tokens'] == 200 and 0 < result['messages'] <= 200
  assert result['cpu_us_per_token'] > 0


def test_tokens_are_merged_within_the_interval(
    gated: Callable[..., Any]) -> None:
  running, runner = gated(config={
    'limits': admission.Limits(stream_interval_ms=200)})
  call = running.generate(token_ids=[1], sampling={'max_tokens': 100})
  runner.let(1)
  assert list(next(call).token_ids) == [2]
  runner.open()
  rest = list(call)
  assert len(rest) <= 3
  assert [t for r in rest for t in r.token_ids] == [
    (3 + k) % 64 for k in range(99)]
