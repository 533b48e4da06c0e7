# SPDX-License-Identifier: Apache-2.0
"""Measures how much one client's body lengthens gaps of others' streams.

There are three processes, so that none measures itself: the server, whose fake
steps take a fixed time; one that reads streams and notes the longest time
between two messages; and this one, which sends bodies that were serialized
before.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping
import contextlib
import pathlib
import time
from typing import Any

import grpc

import sarathi_jax
from sarathi_jax.benchmarks import common
from sarathi_jax.benchmarks import hostile_bodies
from sarathi_jax.benchmarks import hostile_http
from sarathi_jax.server import sarathi_pb2 as pb
from sarathi_jax.server import sarathi_pb2_grpc

TOKENIZER = pathlib.Path(sarathi_jax.__file__).parent / 'quickstart' / 'model'
_NUM_STREAMS = 4
_AFTER_S = 0.3  # a body's work may go on when its call is over
_TIMEOUT_S = 120.0


def watch(pipe: Any, port: int) -> None:
  """Reads streams; tells, if asked, the longest gap since it was last asked."""
  longest = 0.0

  async def read(stub: Any) -> None:
    nonlocal longest
    while True:
      last = None
      async for _ in stub.Generate(
        pb.GenerateRequest(
          token_ids=pb.TokenIds(ids=[7]),
          sampling=pb.SamplingParams(fill_context=True, ignore_eos=True),
        )
      ):
        now = time.monotonic()
        longest = max(longest, now - (last or now))
        last = now

  async def main() -> None:
    nonlocal longest
    async with grpc.aio.insecure_channel(f'127.0.0.1:{port}') as channel:
      stub = sarathi_pb2_grpc.SarathiStub(channel)  # type: ignore[no-untyped-call]
      reading = [asyncio.create_task(read(stub)) for _ in range(_NUM_STREAMS)]
      loop = asyncio.get_running_loop()
      while await loop.run_in_executor(None, pipe.recv):
        pipe.send(longest)
        longest = 0.0
      for task in reading:
        task.cancel()

  asyncio.run(main())


def send(
  channel: grpc.Channel, body: hostile_bodies.Body, http_port: int | None = None
) -> str:
  """Sends a body as often at once as it says; returns what became of it."""
  if body.method == hostile_http.METHOD:
    assert http_port is not None
    return hostile_http.send(http_port, body.data)
  call: Callable[..., Any] = channel.unary_stream(body.method)
  data: Any = body.data
  if body.method.endswith(('ModelStreamInfer', 'ServerReflectionInfo')):
    call, data = channel.stream_stream(body.method), iter([body.data])
  calls = [call(data, timeout=_TIMEOUT_S) for _ in range(body.num_calls)]
  counts: dict[str, int] = {}
  for each in calls:
    with contextlib.suppress(grpc.RpcError):
      for _ in each:
        pass
    counts[each.code().name] = counts.get(each.code().name, 0) + 1
  return ', '.join(
    name if len(counts) == 1 else f'{num} {name}'
    for name, num in counts.items()
  )


def measure(
  port: int,
  bodies: Iterable[hostile_bodies.Body],
  repeats: int,
  http_port: int | None = None,
) -> Iterator[dict[str, Any]]:
  """Sends bodies to a server that is there.

  Args:
    port: the server's.
    bodies: what to send.
    repeats: how often; the least gap counts, as others may use the machine.
    http_port: the server's, too; for bodies of HTTP.

  Yields:
    A row for each body: `gap_ms`, the longest gap of others while it was
    served, and `quiet_ms`, that of as long a time without it.
  """
  with (
    common.process(watch, port) as watcher,
    grpc.insecure_channel(
      f'127.0.0.1:{port}',
      options=[
        ('grpc.max_send_message_length', -1),
        ('grpc.max_receive_message_length', -1),
      ],
    ) as channel,
  ):

    def longest_gap() -> float:
      watcher.send(True)
      gap: float = watcher.recv()
      return gap

    while not longest_gap():  # until streams run
      time.sleep(0.1)
    time.sleep(1.0)
    for body in bodies:
      best: dict[str, Any] = {}
      for _ in range(repeats):
        longest_gap()
        start = time.monotonic()
        outcome = send(channel, body, http_port)
        seconds = time.monotonic() - start
        time.sleep(_AFTER_S)
        gap = longest_gap()
        time.sleep(seconds + _AFTER_S)
        quiet = longest_gap()
        row = {
          'body': body.name,
          'bytes': len(body.data),
          'calls': body.num_calls,
          'outcome': outcome,
          'seconds': seconds,
          'gap_ms': gap * 1e3,
          'quiet_ms': quiet * 1e3,
          'lengthened_ms': max(gap - quiet, 0) * 1e3,
        }
        if not best or row['lengthened_ms'] < best['lengthened_ms']:
          best = row
      assert not body.is_served or best['outcome'] == 'OK', best
      yield best


def line(row: Mapping[str, Any]) -> str:
  """Returns a result as a line for people."""
  return (
    f'{row["body"]:38} {row["bytes"] / 1024:9,.0f} KiB '
    f"{row['seconds']:7.2f} s  others' longest gap "
    f'{row["gap_ms"]:5.0f} ms, quiet {row["quiet_ms"]:5.0f} ms: '
    f'lengthened by {row["lengthened_ms"]:5.0f} ms  {row["outcome"]}'
  )
