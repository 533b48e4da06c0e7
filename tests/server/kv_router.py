# SPDX-License-Identifier: Apache-2.0
"""A router that follows what a server's cache has, and believes all of it."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import functools
import threading
from typing import Any

import grpc
from smg_grpc_proto import vllm_engine_pb2 as pb
from smg_grpc_proto import vllm_engine_pb2_grpc
from smg_grpc_proto.generated import common_pb2

from tests.server import fake

PAGE = 4


class Router:
  """Knows what a server's cache has, by its messages alone."""

  def __init__(self) -> None:
    self.last = 0
    # hash -> (the hash before it, tokens, salt)
    self.pages: dict[int, tuple[int | None, tuple[int, ...], str]] = {}
    self.seen: list[str] = []  # kinds of events
    self.load = common_pb2.EngineLoad()

  def apply(self, message: common_pb2.KvEventBatch) -> None:
    assert message.load.sample > self.load.sample
    self.load = message.load
    if message.load.load_only:
      assert message.sequence_number == self.last and not message.events
      return
    if message.HasField('snapshot') and not message.snapshot.index:
      assert message.events[0].WhichOneof('data') == 'cleared'
      self.last = message.sequence_number - 1
    assert message.sequence_number == self.last + 1
    self.last = message.sequence_number
    assert message.events and message.timestamp > 0
    for event in message.events:
      kind = event.WhichOneof('data')
      self.seen.append(kind)
      if kind == 'stored':
        self._store(event.stored)
      elif kind == 'removed':
        for page in event.removed.block_hashes:
          del self.pages[page]
          assert all(parent != page for parent, _, _ in self.pages.values())
      else:
        self.pages.clear()

  def _store(self, stored: common_pb2.KvBlocksStored) -> None:
    parent = None
    if stored.HasField('parent_block_hash'):
      parent = stored.parent_block_hash
    for block in stored.blocks:
      assert block.block_hash not in self.pages
      assert parent is None or parent in self.pages
      assert len(block.token_ids) == block.block_size
      self.pages[block.block_hash] = (
        parent,
        tuple(block.token_ids),
        stored.cache_salt,
      )
      parent = block.block_hash

  def beginnings(self, salt: str | None = None) -> set[tuple[int, ...]]:
    """What prompts may begin with, of any salt or one."""

    def tokens(page: int) -> tuple[int, ...]:
      parent, own, _ = self.pages[page]
      return own if parent is None else tokens(parent) + own

    return {
      tokens(page) for page, of in self.pages.items() if salt in (None, of[2])
    }

  def num_found(self, prompt: list[int]) -> int:
    known = self.beginnings('')
    num = 0
    while num + PAGE < len(prompt) and tuple(prompt[: num + PAGE]) in known:
      num += PAGE
    return num


class Following:
  """A router that follows a server on a thread of its own."""

  def __init__(
    self, running: fake.RunningServer, start: int = 0, token: str = ''
  ) -> None:
    self.router = Router()
    self.router.last = start
    self._running = running
    self.call = subscribe(running, start, token)
    self._thread = threading.Thread(target=self._read, daemon=True)
    self._thread.start()

  def _read(self) -> None:
    with contextlib.suppress(grpc.RpcError):
      for message in self.call:
        self.router.apply(message)

  def catch_up(self) -> Router:
    """Waits until the router knows of all that has been."""
    journal = self._running.server._journal
    assert journal is not None
    # What an earlier step did has been told when the engine is asked again.
    self._running.run(
      self._running.server._engine_thread.call(lambda engine: None)
    )
    fake.wait_until(lambda: self.router.last >= journal._sequence)
    return self.router

  def stop(self) -> None:
    self.call.cancel()
    self._thread.join()


def stub_of(running: fake.RunningServer) -> Any:
  return vllm_engine_pb2_grpc.VllmEngineStub(running.channel)


def subscribe(
  running: fake.RunningServer, start: int = 0, token: str = ''
) -> Any:
  return stub_of(running).SubscribeKvEvents(
    common_pb2.SubscribeKvEventsRequest(start_sequence_number=start),
    timeout=fake.TIMEOUT_S,
    metadata=[('authorization', f'Bearer {token}')] if token else None,
  )


def generate(
  running: fake.RunningServer, prompt: list[int], max_tokens: int = 1
) -> int:
  """Runs a prompt; returns how many of its tokens were found."""
  (whole,) = stub_of(running).Generate(
    pb.GenerateRequest(
      tokenized=pb.TokenizedInput(input_ids=prompt),
      sampling_params=pb.SamplingParams(max_tokens=max_tokens),
    ),
    timeout=fake.TIMEOUT_S,
  )
  found: int = whole.complete.cached_tokens
  return found


def flush(running: fake.RunningServer, timeout_s: float = 0.0, **kwargs: Any):
  return stub_of(running).FlushCache(
    common_pb2.FlushCacheRequest(timeout_s=timeout_s),
    timeout=fake.TIMEOUT_S,
    **kwargs,
  )


def end_of(call: Any) -> tuple[grpc.StatusCode, str]:
  with contextlib.suppress(grpc.RpcError):
    list(call)
  return call.code(), call.details()


@contextlib.contextmanager
def serving(
  engine: dict[str, Any] | None = None, **config: Any
) -> Iterator[fake.RunningServer]:
  with contextlib.closing(
    fake.RunningServer(
      functools.partial(fake.make_engine, **(engine or {})), **config
    )
  ) as running:
    yield running


@contextlib.contextmanager
def following(running: fake.RunningServer, *args: Any) -> Iterator[Following]:
  follower = Following(running, *args)
  try:
    yield follower
  finally:
    follower.stop()
