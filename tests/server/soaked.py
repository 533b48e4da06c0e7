# SPDX-License-Identifier: Apache-2.0
"""A server in a process of its own, which tells how much it holds.

Its clients are in another process, so that what they hold does not count.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
import contextlib
import ctypes
import functools
import gc
import multiprocessing
import os
import sys
from typing import Any, NamedTuple

import grpc
import psutil

from sarathi_jax.server import sarathi_pb2 as pb
from sarathi_jax.server import sarathi_pb2_grpc
from sarathi_jax.server.queue import admission
from tests.server import fake


class Holds(NamedTuple):
  """What a server's process has, at rest."""

  rss: int  # bytes
  blocks: int  # pieces of memory that Python's objects are in
  files: int  # that are open
  preemptions: int  # so far


class Soaked:
  """One server, to be asked what it holds.

  Attributes:
    port: where it listens.
  """

  def __init__(self, pipe: Any) -> None:
    self._pipe = pipe
    self.port: int = pipe.recv()

  def holds(self) -> Holds:
    """Asks, once all is at rest; EOFError if anything is left over."""
    self._pipe.send(True)
    return self._pipe.recv()


@contextlib.contextmanager
def run(serve: Callable[[Any], None]) -> Iterator[Soaked]:
  """Runs one of the functions below in a process."""
  context = multiprocessing.get_context('spawn')
  here, there = context.Pipe()
  process = context.Process(target=serve, args=(there,))
  process.start()
  there.close()
  try:
    soaked = Soaked(here)
    yield soaked
    here.send(False)
    process.join(fake.TIMEOUT_S)
    assert process.exitcode == 0
  finally:
    process.kill()
    process.join()


def ours(pipe: Any) -> None:
  """Scarce pages, so that preemption is in the play, too."""
  with contextlib.closing(_make()) as running:
    _answer(pipe, running)


def leaks_objects(pipe: Any) -> None:
  """As `ours`, but each request leaves a small object."""
  _leak(pipe, [].append)


def leaks_files(pipe: Any) -> None:
  """As `ours`, but some requests leave an open file."""
  count = iter(range(sys.maxsize))
  _leak(
    pipe, lambda ended: next(count) % 20 or os.open(os.devnull, os.O_RDONLY)
  )


def leaks_memory(pipe: Any) -> None:
  """As `ours`, but each request leaves memory that Python does not know."""
  libc = ctypes.CDLL(None)
  libc.malloc.restype = ctypes.c_void_p

  def leak(ended: Any) -> None:
    del ended
    ctypes.memset(libc.malloc(ctypes.c_size_t(40_000)), 1, 40_000)

  _leak(pipe, leak)


def bare(pipe: Any) -> None:
  """Nothing but gRPC, which counts up as `ours` does."""

  async def main() -> None:
    server = grpc.aio.server()
    sarathi_pb2_grpc.add_SarathiServicer_to_server(_Counting(), server)
    pipe.send(server.add_insecure_port('127.0.0.1:0'))
    await server.start()
    while await asyncio.to_thread(pipe.recv):
      pipe.send(_holds())
    await server.stop(None)

  asyncio.run(main())


class _Counting(sarathi_pb2_grpc.SarathiServicer):
  async def Generate(self, request: pb.GenerateRequest, context: Any) -> None:
    first = request.token_ids.ids[0]
    for k in range(request.sampling.max_tokens):
      await asyncio.sleep(0.001)
      await context.write(
        pb.GenerateResponse(token_ids=[(first + 1 + k) % fake.VOCAB_SIZE])
      )


def _make() -> fake.RunningServer:
  return fake.RunningServer(
    functools.partial(
      fake.make_engine, token_budget=64, max_num_seqs=16, num_pages=64
    ),
    limits=admission.Limits(max_waiting=2000),
  )


def _leak(pipe: Any, observe: Callable[[Any], object]) -> None:
  with contextlib.closing(_make()) as running:
    running.server.frontend._observers = (observe,)
    _answer(pipe, running)


def _answer(pipe: Any, running: fake.RunningServer) -> None:
  pipe.send(running.server.port)
  while pipe.recv():
    running.assert_nothing_is_left()
    pipe.send(_holds(running.engine.stats().num_preemptions))


def _holds(preemptions: int = 0) -> Holds:
  me = psutil.Process()
  gc.collect()
  return Holds(
    me.memory_info().rss, sys.getallocatedblocks(), me.num_fds(), preemptions
  )
