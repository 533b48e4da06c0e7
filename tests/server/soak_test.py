# SPDX-License-Identifier: Apache-2.0
"""A long time of requests, many of them given up: nothing is lost or grows."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
import random
import time
from typing import Any

import grpc
import pytest

from sarathi_jax.server import sarathi_pb2 as pb
from sarathi_jax.server import sarathi_pb2_grpc
from tests.server import soaked

# Bytes that grpc.aio loses for a call that is cut short: the operations of a
# batch that fails or is cancelled are never freed (grpc/grpc#43360; seen with
# grpcio 1.85.1, on either side of a call).
_LOST_BY_GRPC = 160


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
    call = self._stub.Generate(
      pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=[first] * num_prompt),
        sampling=(pb.SamplingParams(max_tokens=max_tokens)),
        priority=rng.randint(-1, 1),
      ),
      timeout=timeout,
    )
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


async def _load(port: int, seconds: float, seed: int) -> tuple[int, int]:
  """Returns how many requests ran to their end, and how many did not."""
  async with grpc.aio.insecure_channel(f'127.0.0.1:{port}') as channel:
    stub = sarathi_pb2_grpc.SarathiStub(channel)
    clients = [_Client(stub, seed + i) for i in range(40)]
    deadline = time.monotonic() + seconds
    await asyncio.gather(*(client.run(deadline) for client in clients))
  return (sum(c.num_done for c in clients), sum(c.num_left for c in clients))


def _check(
  serve: Callable[[Any], None], seconds: float
) -> tuple[soaked.Holds, int]:
  """Holds what a server has after a while against what it had before.

  Returns:
    The difference, and how many requests did not run to their end.
  """
  with soaked.run(serve) as server:
    asyncio.run(_load(server.port, max(seconds / 5, 2), 0))
    before = server.holds()
    done, left = asyncio.run(_load(server.port, seconds, 1000))
    after = server.holds()
    grown = soaked.Holds(*(b - a for a, b in zip(before, after, strict=True)))
    print(
      f'{seconds} s: {done} requests done, {left} left; before: {before}; '
      f'grown by: {grown}'
    )
    assert done > 10 * seconds and left > 10 * seconds
    assert grown.blocks < 4000
    assert grown.files <= 5
    assert grown.rss < (16 << 20) + left * _LOST_BY_GRPC
  return grown, left


@pytest.mark.parametrize(
  'seconds',
  [
    5,
    pytest.param(30, marks=pytest.mark.slow),
    pytest.param(600, marks=pytest.mark.soak),
  ],
)
def test_random_cancels(seconds: float) -> None:
  grown, _ = _check(soaked.ours, seconds)
  assert grown.preemptions > 0


@pytest.mark.parametrize(
  'serve, found',
  [
    (soaked.leaks_objects, 'blocks'),
    pytest.param(soaked.leaks_files, 'files', marks=pytest.mark.slow),
    pytest.param(soaked.leaks_memory, 'rss', marks=pytest.mark.slow),
  ],
)
def test_a_leak_is_found(serve: Callable[[Any], None], found: str) -> None:
  with pytest.raises(AssertionError, match=rf'\.{found}'):
    _check(serve, 4)


@pytest.mark.soak
def test_grpc_alone_loses_memory_too() -> None:
  grown, left = _check(soaked.bare, 60)
  assert grown.rss > left * _LOST_BY_GRPC / 10, (
    'grpc.aio frees what it lost until now: allow nothing for it any more.'
  )
