# SPDX-License-Identifier: Apache-2.0
"""An engine whose tokens count up, in a server on a thread of its own.

Run as a script it is a server process; see `main`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
import contextlib
import functools
import pathlib
import socket
import sys
import threading
import time
from typing import Any

import grpc
import tokenizers
from tokenizers import models
from tokenizers import pre_tokenizers

from sarathi_jax import config as config_lib
from sarathi_jax import scheduler as scheduler_lib
from sarathi_jax import types
from sarathi_jax.engine import engine as engine_lib
from sarathi_jax.engine import fake_runner
from sarathi_jax.server import sarathi_pb2 as pb
from sarathi_jax.server import sarathi_pb2_grpc
from sarathi_jax.server import server as server_lib
from sarathi_jax.server.protocols import control_v1
from sarathi_jax.text import tokenizer as tokenizer_lib

VOCAB_SIZE = 64
TIMEOUT_S = 60.0  # of what should take milliseconds


class GatedRunner(fake_runner.FakeRunner):
  """Completes a step for every `let(1)`, or all of them once `opened`."""

  def __init__(self, *args: Any) -> None:
    super().__init__(*args)
    self._steps = threading.Semaphore(0)
    self._is_open = False
    self.fault: Exception | None = None  # of the next step
    self.is_gone = False  # whether the device does not go on after a fault

  def let(self, num_steps: int) -> None:
    self._steps.release(num_steps)

  def open(self) -> None:
    self._is_open = True
    self._steps.release()

  def close(self) -> None:
    self._is_open = False

  def fetch(self, pending: types.Sampled) -> types.Sampled:
    if not self._is_open:
      self._steps.acquire()
    if self.fault is not None:
      fault, self.fault = self.fault, None
      raise fault
    return super().fetch(pending)

  def recover(self) -> None:
    if self.is_gone:
      raise RuntimeError('the device is gone')


def free_port() -> int:
  """A port of this machine that nobody listens at."""
  with socket.create_server(('127.0.0.1', 0)) as probe:
    port: int = probe.getsockname()[1]
    return port


def write_tokenizer(folder: pathlib.Path) -> pathlib.Path:
  """Text is words 't0' to 't63', each the token of its number."""
  words = tokenizers.Tokenizer(
    models.WordLevel({f't{i}': i for i in range(VOCAB_SIZE)}, unk_token='t0')
  )
  words.pre_tokenizer = pre_tokenizers.Whitespace()
  words.save(str(folder / 'tokenizer.json'))
  return folder


def make_engine(
  runner: Callable[[int, int], fake_runner.FakeRunner] = (
    fake_runner.FakeRunner
  ),
  tokenizer_folder: pathlib.Path | None = None,
  model_name: str = 'counting',
  default_sampling: Mapping[str, Any] | None = None,
  vocab_size: int = VOCAB_SIZE,
  adapters: Mapping[str, Any] | None = None,
  **changes: Any,
) -> engine_lib.Engine:
  """An engine of 64 pages of 4 tokens; `changes` are to SchedulerConfig."""
  config = config_lib.SchedulerConfig(
    **{
      'token_budget': 8,
      'max_num_seqs': 4,
      'max_model_len': 128,
      'num_pages': 64,
      'page_size': 4,
      'max_loras': len(adapters or ()) or None,
      **changes,
    }
  )
  info = engine_lib.EngineInfo.of(
    config,
    policy='sarathi',
    model_name=model_name,
    family='fake',
    vocab_size=vocab_size,
    default_sampling=default_sampling or {},
  )
  return engine_lib.Engine(
    scheduler_lib.policy_class('sarathi')(config),
    runner(vocab_size, config.max_num_seqs),
    info=info,
    adapters=adapters or {},
    tokenizer=(
      None
      if tokenizer_folder is None
      else tokenizer_lib.Tokenizer(tokenizer_folder)
    ),
  )


def wait_until(
  condition: Callable[[], bool], timeout_s: float = TIMEOUT_S
) -> None:
  """Waits for what another thread is about to bring about."""
  deadline = time.monotonic() + timeout_s
  while not condition():
    assert time.monotonic() < deadline, 'it did not come about'
    time.sleep(0.002)


def step_until_done(reply: Any, runner: GatedRunner) -> None:
  """Lets steps complete until a call is answered.

  Slowly, so that what it asks for is there before an output's end, on a busy
  machine, too.
  """
  while not reply.done():
    runner.let(1)
    with contextlib.suppress(grpc.FutureTimeoutError):
      reply.result(0.02)


def take(call: Any, num_tokens: int | None = None) -> list[int]:
  """The next tokens of a call, or all; a message may have several."""
  tokens: list[int] = []
  while num_tokens is None or len(tokens) < num_tokens:
    response = next(call, None)
    if response is None:
      break
    tokens += response.token_ids
  assert num_tokens in (None, len(tokens))
  return tokens


def code_of(call: Any) -> grpc.StatusCode:
  """Returns the status of a stream, which is read to its end."""
  with contextlib.suppress(grpc.RpcError):
    list(call)
  code: grpc.StatusCode = call.code()
  return code


class RunningServer:
  """A server on its own event loop and thread, and a client of it."""

  def __init__(
    self,
    make: Callable[[], engine_lib.Engine],
    *,
    wait: bool = True,
    hooks: control_v1.Hooks | None = None,
    **config: Any,
  ) -> None:
    self._loop = asyncio.new_event_loop()
    self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
    self._thread.start()
    self.server = self.run(self._make(make, hooks, config))
    self.run(self.server.start())
    self.warming = asyncio.run_coroutine_threadsafe(
      self.server.warm(), self._loop
    )
    self.channel = grpc.insecure_channel(f'127.0.0.1:{self.server.port}')
    self.stub = self.stub_of(self.channel)
    if wait:
      self.warming.result(TIMEOUT_S)

  async def _make(
    self,
    make: Callable[[], engine_lib.Engine],
    hooks: Any,
    config: dict[str, Any],
  ) -> server_lib.Server:
    return server_lib.Server(
      server_lib.ServerConfig(**{'port': 0, 'drain_s': TIMEOUT_S, **config}),
      make,
      hooks=hooks,
    )

  @staticmethod
  def stub_of(channel: grpc.Channel) -> Any:
    return sarathi_pb2_grpc.SarathiStub(channel)

  @property
  def engine(self) -> engine_lib.Engine:
    return self.server.frontend.engine

  def submit(self, work: Coroutine[Any, Any, Any]) -> Any:
    """Starts work on the server's event loop; returns its future."""
    return asyncio.run_coroutine_threadsafe(work, self._loop)

  def run(self, work: Coroutine[Any, Any, Any]) -> Any:
    return self.submit(work).result(TIMEOUT_S)

  def wait_until_open(self, num_requests: int) -> None:
    """Waits until so many short requests are with the engine's thread."""
    wait_until(lambda: self.server.frontend.num_open == num_requests)
    self.run(asyncio.sleep(0))  # what counted them has submitted them, too

  def generate(
    self, *, timeout: float = TIMEOUT_S, sampling: Any = None, **fields: Any
  ) -> Any:
    """A call; `token_ids` may be a list, `sampling` a dict."""
    if 'token_ids' in fields:
      fields['token_ids'] = pb.TokenIds(ids=fields['token_ids'])
    return self.stub.Generate(
      pb.GenerateRequest(
        sampling=pb.SamplingParams(**(sampling or {})), **fields
      ),
      timeout=timeout,
    )

  def stats(self) -> Any:
    return self.stub.GetStats(pb.GetStatsRequest(), timeout=TIMEOUT_S)

  def all_pages_are_free(self) -> bool:
    stats = self.stats()
    return (
      stats.num_free_pages == stats.num_pages
      and not stats.num_running + stats.num_waiting
    )

  def is_alive(self) -> bool:
    """Whether a good request is still answered, and no page is lost."""
    tokens = [
      t
      for r in self.generate(token_ids=[1, 2], sampling={'max_tokens': 3})
      for t in r.token_ids
    ]
    return tokens == [3, 4, 5] and self.all_pages_are_free()

  def assert_nothing_is_left(self) -> None:
    """Waits until all is at rest; nothing knows of any request then."""
    wait_until(self.all_pages_are_free)
    frontend = self.server.frontend
    thread = frontend.engine_thread
    wait_until(lambda: not frontend.num_open)
    assert not (
      thread._streams
      or thread.num_queued
      or frontend._streams
      or self.engine._live
    )
    assert self.is_alive()

  def close(self) -> None:
    self.channel.close()
    self.run(self.server.stop())
    self._loop.call_soon_threadsafe(self._loop.stop)
    self._thread.join()
    self._loop.close()


def main() -> None:
  """PORT DRAIN_S [TOKENIZER-FOLDER [FIELD=PORT ...]]: without a folder loading
  is stuck, without fields of ServerConfig requests may take hours."""
  from sarathi_jax.server import main as main_lib

  port, drain_s, *more = sys.argv[1:]
  folder = more.pop(0) if more else None
  ports = {
    field: int(port) for field, port in (text.split('=') for text in more)
  }
  size = (
    dict(max_model_len=2**20, num_pages=2**18)
    if not ports
    else dict(max_num_seqs=32, token_budget=64, num_pages=2**12)
  )

  def make() -> engine_lib.Engine:
    if folder is None:
      print('Stuck', flush=True)
      threading.Event().wait()
    # Steps take time: a client that is held up must not be too slow a reader.
    return make_engine(
      functools.partial(fake_runner.FakeRunner, step_s=0.005),
      tokenizer_folder=pathlib.Path(folder),
      **size,
    )

  main_lib.serve(
    server_lib.ServerConfig(
      port=int(port),
      drain_s=float(drain_s),
      **ports,
    ),
    make,
  )


if __name__ == '__main__':
  main()
