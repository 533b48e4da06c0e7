# SPDX-License-Identifier: Apache-2.0
"""Many streams at once: nothing is lost, nothing grows."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
import contextlib
import functools
import gc
import time
from typing import Any

import grpc
import psutil
import pytest

from sarathi_jax.benchmarks import front_http
from sarathi_jax.benchmarks import server_front
from sarathi_jax.server import sarathi_pb2 as pb
from sarathi_jax.server import sarathi_pb2_grpc
from sarathi_jax.server.queue import admission
from tests.server import fake

_ME = psutil.Process()


@pytest.fixture
def roomy() -> Iterator[fake.RunningServer]:
  """Scarce pages, so that preemption is in the play, too."""
  with contextlib.closing(
    fake.RunningServer(
      functools.partial(
        fake.make_engine, token_budget=64, max_num_seqs=16, num_pages=64
      ),
      limits=admission.Limits(max_waiting=2000),
    )
  ) as running:
    yield running


def _sizes(running: fake.RunningServer) -> tuple[int, int]:
  """(bytes in memory, open files) once all is at rest."""
  fake.wait_until(running.all_pages_are_free)
  gc.collect()
  return _ME.memory_info().rss, _ME.num_fds()


def test_a_thousand_streams_at_once(roomy: fake.RunningServer) -> None:
  port = roomy.server.port
  for num_streams in (200, 1000):
    # Each checks its own tokens.
    assert len(asyncio.run(_count_up(port, num_streams))) == num_streams
  before, num_files = _sizes(roomy)
  asyncio.run(_count_up(port, 1000))
  after, num_files_after = _sizes(roomy)
  roomy.assert_nothing_is_left()
  assert after - before < 24 << 20
  assert num_files_after <= num_files + 5


@pytest.mark.slow
def test_calls_that_wait_long_to_be_begun_are_begun(
  roomy: fake.RunningServer,
) -> None:
  """gRPC would cancel them after 30 s, without a word."""

  async def block() -> None:
    time.sleep(32)  # Nothing is begun meanwhile.

  blocked = roomy.submit(block())
  calls = [roomy.generate(token_ids=[1], timeout=60) for _ in range(50)]
  blocked.result(60)
  assert all(fake.take(call) for call in calls)


async def _count_up(port: int, num_streams: int) -> list[int]:
  async def one(stub: Any, i: int) -> int:
    tokens: list[int] = []
    async for response in stub.Generate(
      pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=[i % 64] * (1 + i % 9)),
        sampling=pb.SamplingParams(max_tokens=1 + i % 20),
      )
    ):
      tokens += response.token_ids
    assert tokens == [(i + 1 + k) % 64 for k in range(1 + i % 20)]
    return i

  async with grpc.aio.insecure_channel(f'127.0.0.1:{port}') as channel:
    stub = sarathi_pb2_grpc.SarathiStub(channel)
    return await asyncio.gather(*(one(stub, i) for i in range(num_streams)))


@pytest.mark.parametrize(
  'num_streams', [200, pytest.param(1000, marks=pytest.mark.slow)]
)
def test_many_streams_over_http(num_streams: int) -> None:
  with contextlib.closing(
    fake.RunningServer(
      functools.partial(
        fake.make_engine, token_budget=64, max_num_seqs=16, num_pages=64
      ),
      limits=admission.Limits(max_waiting=2000),
      http_port=0,
    )
  ) as running:
    port, before = running.server.http_port, 0
    for _ in range(3):
      # Each checks its own tokens.
      asyncio.run(front_http.drive(port, num_streams, 20, fake.VOCAB_SIZE))
      _, num_files = _sizes(running)
      assert not before or num_files <= before + 5
      before = num_files
    running.assert_nothing_is_left()


@pytest.mark.slow
def test_the_benchmark_of_http_runs() -> None:
  row = server_front.compare_http(20, 10, 0.001, 0, repeats=1)
  assert row['http_us_per_token'] > 0 < row['grpc_us_per_token']
  assert row['ratio'] > 0


def test_the_benchmark_of_the_front_runs() -> None:
  result = server_front.compare(
    num_streams=20, num_tokens=10, step_s=0.001, stream_interval_ms=0
  )
  assert result['tokens'] == 200 and 0 < result['messages'] <= 200
  assert result['cpu_us_per_token'] > 0 < result['grpc_cpu_us_per_message']
  assert server_front.table([result]).row_count == 1


def test_tokens_are_merged_within_the_interval(
  gated: Callable[..., Any],
) -> None:
  running, runner = gated(
    config={'limits': admission.Limits(stream_interval_ms=200)}
  )
  call = running.generate(token_ids=[1], sampling={'max_tokens': 100})
  runner.let(1)
  assert list(next(call).token_ids) == [2]
  runner.open()
  rest = list(call)
  assert len(rest) <= 3
  assert [t for r in rest for t in r.token_ids] == [
    (3 + k) % 64 for k in range(99)
  ]
