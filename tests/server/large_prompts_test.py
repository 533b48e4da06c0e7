# SPDX-License-Identifier: Apache-2.0
"""Large prompts are served, and hold up nobody else."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
import contextlib
import pathlib
import threading
import time
from typing import Any

import grpc
import pytest
import tokenizers

from sarathi_jax import errors
from sarathi_jax.benchmarks import hostile
from sarathi_jax.benchmarks import hostile_bodies
from sarathi_jax.server import sarathi_pb2 as pb
from sarathi_jax.server import sarathi_pb2_grpc
from sarathi_jax.server.guard import limits as limits_lib
from sarathi_jax.server.protocols import messages
from sarathi_jax.text import tokenizer as tokenizer_lib
from tests.server import fake

_CODE = grpc.StatusCode


def _tokens(running: fake.RunningServer, **fields: Any) -> Any:
  return list(
    running.stub.Generate(
      pb.GenerateRequest(
        sampling=pb.SamplingParams(
          max_tokens=2,
          ignore_eos=True,
          stop=[f'zz{i}' for i in range(128)],
          stop_token_ids=[2000] * 1024,
        ),
        **fields,
      ),
      timeout=60,
    )
  )


def test_large_prompts_are_served(roomy: fake.RunningServer) -> None:
  done = _tokens(roomy, token_ids=pb.TokenIds(ids=[5] * 100_000))
  assert done[-1].finished.usage.prompt_tokens == 100_000
  done = _tokens(roomy, text='the list ' * 50_000)
  assert done[-1].finished.usage.prompt_tokens >= 100_000
  done = _tokens(
    roomy,
    chat=pb.Chat(
      messages=[
        pb.ChatMessage(role=('user', 'assistant')[i % 2], content='x')
        for i in range(10_000)
      ]
    ),
  )
  assert done[-1].finished.usage.prompt_tokens >= 20_000


def test_a_full_queue_tokenizes_nothing(
  gated: Callable[..., Any],
  tokenizer_folder: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  running, runner = gated(
    max_num_seqs=1,
    tokenizer_folder=tokenizer_folder,
    config={'limits': limits_lib.Limits(max_waiting=1)},
  )
  calls = []
  for i in range(2):
    calls.append(running.generate(token_ids=[1], sampling={'max_tokens': 2}))
    running.wait_until_open(i + 1)
    if not i:
      runner.let(1)
      fake.wait_until(
        lambda: not running.server.frontend.engine_thread.num_queued
      )
  monkeypatch.setattr(running.engine.tokenizer, 'encode', None)
  ended: list[Any] = []
  monkeypatch.setattr(running.server.frontend, '_observers', (ended.append,))
  call = running.generate(text='t1 t2')
  with pytest.raises(grpc.RpcError):
    list(call)
  assert call.code() is _CODE.RESOURCE_EXHAUSTED
  fake.wait_until(lambda: bool(ended))
  assert isinstance(ended[0].error, errors.CapacityError)  # for the log
  runner.open()
  assert [fake.take(call) for call in calls] == [[2, 3]] * 2


def test_prompts_that_are_being_tokenized_count_as_waiting(
  gated: Callable[..., Any],
  tokenizer_folder: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  running, runner = gated(
    tokenizer_folder=tokenizer_folder,
    config={'limits': limits_lib.Limits(max_waiting=2)},
  )
  go = threading.Event()
  encode = running.engine.tokenizer.encode
  monkeypatch.setattr(
    running.engine.tokenizer,
    'encode',
    lambda text, check: go.wait(fake.TIMEOUT_S) and encode(text, check=check),
  )
  text = 't1' + ' ' * 2000
  held = [
    running.generate(text=text, sampling={'max_tokens': 1}) for _ in range(2)
  ]
  fake.wait_until(lambda: running.server.frontend.num_open == 2)
  call = running.generate(text=text)
  with pytest.raises(grpc.RpcError):
    list(call)
  assert call.code() is _CODE.RESOURCE_EXHAUSTED
  assert 'max_waiting=2' in call.details()
  go.set()
  runner.open()
  assert [fake.take(call) for call in held] == [[2], [2]]


def test_a_burst_is_refused_with_a_hint_and_never_cancelled(
  server: fake.RunningServer,
) -> None:
  async def one(stub: Any) -> Any:
    call = stub.Generate(
      pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=[5]), sampling=pb.SamplingParams(max_tokens=2)
      )
    )
    with contextlib.suppress(grpc.aio.AioRpcError):
      async for _ in call:
        pass
    return await call.code(), dict(await call.trailing_metadata())

  async def burst() -> Any:
    async with contextlib.AsyncExitStack() as stack:
      stubs = [
        sarathi_pb2_grpc.SarathiStub(
          await stack.enter_async_context(
            grpc.aio.insecure_channel(
              f'127.0.0.1:{server.server.port}',
              options=[('grpc.use_local_subchannel_pool', 1)],
            )
          )
        )
        for _ in range(10)
      ]
      return await asyncio.gather(*(one(stubs[i % 10]) for i in range(3000)))

  results = asyncio.run(burst())
  assert {code for code, _ in results} <= {_CODE.OK, _CODE.RESOURCE_EXHAUSTED}
  assert all(
    int(trailing['grpc-retry-pushback-ms']) > 0
    for code, trailing in results
    if code is not _CODE.OK
  )
  assert server.is_alive()


def test_tokenizing_lets_other_threads_run() -> None:
  tokenizer = tokenizer_lib.Tokenizer(hostile.TOKENIZER)
  num_ticks, is_over = 0, False

  def tick() -> None:
    nonlocal num_ticks
    while not is_over:
      time.sleep(0.001)
      num_ticks += 1

  thread = threading.Thread(target=tick)
  thread.start()
  try:
    for text in ('hello world ' * 40_000, ' ' * 500_000):
      before = num_ticks
      assert len(tokenizer.encode(text)) > 1000
      assert num_ticks - before > 5
  finally:
    is_over = True
    thread.join()


def test_large_messages_hold_up_no_others() -> None:
  is_over = threading.Event()

  async def run() -> None:
    try:
      for _ in range(2):  # those whose clients left are read on, too
        large = [
          asyncio.create_task(messages.read(1 << 20, is_over.wait))
          for _ in range(100)
        ]
        for size in (1, 2048, 65_536):
          assert (
            await asyncio.wait_for(messages.read(size, lambda: 'read'), 5.0)
            == 'read'
          )
        for task in large[:50]:
          task.cancel()
    finally:
      is_over.set()
    assert await messages.read(1 << 20, lambda: 'read') == 'read'

  asyncio.run(run())


def test_texts_are_tokenized_as_the_library_does() -> None:
  tokenizer = tokenizer_lib.Tokenizer(hostile.TOKENIZER)
  library = tokenizers.Tokenizer.from_file(
    str(hostile.TOKENIZER / 'tokenizer.json')
  )
  for text in (
    '',
    ' ',
    'The for statement',
    'a\u0301\u4e2d\U0001f600\n\t x',
    '<|user|>x<|end|>',
    'def f(x):\n    return x  # ' * 50,
  ):
    assert tokenizer.encode(text) == tuple(library.encode(text).ids)
    assert tokenizer._encode(text, False) == tuple(
      library.encode(text, add_special_tokens=False).ids
    )


def test_the_benchmark_of_hostile_bodies_runs(
  roomy: fake.RunningServer,
) -> None:
  (row,) = hostile.measure(
    roomy.server.port, hostile_bodies.all_bodies('shape of 60,000'), 1
  )
  assert row['outcome'] == 'INVALID_ARGUMENT'
  # This server's steps take no time, so that streams may be over: no gap.
  assert row['gap_ms'] < 1e3 * fake.TIMEOUT_S
  assert 'shape of 60,000' in hostile.line(row)
