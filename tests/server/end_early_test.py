# SPDX-License-Identifier: Apache-2.0
"""Cancel, deadline and Abort, at every phase, free the pages at once.

Each request asks for more tokens than its test lets steps through, so pages
that are free again were freed by the abort.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
from typing import Any

import grpc
import pytest

from sarathi_jax import errors
from sarathi_jax import types
from sarathi_jax.server import frontend as frontend_lib
from sarathi_jax.server import sarathi_pb2 as pb
from tests.server import fake

LONG = {'max_tokens': 100}


def _free(running: fake.RunningServer) -> int:
  """Of a step that waits at its gate, so that nothing changes meanwhile."""
  return running.engine.stats().num_free_pages


def _assert_aborted(
  running: fake.RunningServer, runner: fake.GatedRunner, num_aborted: int = 1
) -> None:
  """The requests that are gone for the front are gone for the engine."""
  num_steps = running.engine.metrics.num_steps
  runner.open()
  fake.wait_until(running.all_pages_are_free)
  assert running.engine.metrics.num_aborted == num_aborted
  assert running.engine.metrics.num_steps <= num_steps + 2  # launched ahead
  assert running.is_alive()


def test_cancel_in_decode(gated: Callable[..., Any]) -> None:
  running, runner = gated()
  call = running.generate(token_ids=[1], sampling=LONG)
  runner.let(2)
  assert fake.take(call, 2) == [2, 3]
  assert _free(running) < 64
  call.cancel()
  running.wait_until_open(0)
  _assert_aborted(running, runner)


def test_cancel_in_prefill(gated: Callable[..., Any]) -> None:
  running, runner = gated()
  call = running.generate(token_ids=[1] * 40, sampling=LONG)
  runner.let(1)  # 8 tokens of 40
  fake.wait_until(lambda: running.engine.metrics.num_steps >= 3)
  assert 64 - 40 // 4 < _free(running) < 64
  call.cancel()
  running.wait_until_open(0)
  _assert_aborted(running, runner)


def test_cancel_in_the_queue_leaves_the_running_one_alone(
  gated: Callable[..., Any],
) -> None:
  running, runner = gated(max_num_seqs=1)
  first = running.generate(token_ids=[1], sampling={'max_tokens': 6})
  runner.let(1)
  assert next(first).token_ids[0] == 2
  second = running.generate(token_ids=[9], sampling=LONG)
  running.wait_until_open(2)
  runner.let(1)
  fake.wait_until(lambda: running.server.frontend.engine_thread.num_queued == 1)
  second.cancel()
  running.wait_until_open(1)
  runner.open()
  assert fake.take(first) == [3, 4, 5, 6, 7]
  fake.wait_until(running.all_pages_are_free)
  assert running.engine.metrics.num_aborted == 0  # the engine never saw it
  assert running.is_alive()


def test_a_lost_connection(gated: Callable[..., Any]) -> None:
  running, runner = gated()
  with grpc.insecure_channel(
    f'127.0.0.1:{running.server.port}',
    options=[('grpc.use_local_subchannel_pool', 1)],
  ) as channel:
    call = running.stub_of(channel).Generate(
      pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=[1]), sampling=pb.SamplingParams(**LONG)
      )
    )
    runner.let(1)
    assert next(call).token_ids[0] == 2
  running.wait_until_open(0)
  _assert_aborted(running, runner)


def test_deadline(gated: Callable[..., Any]) -> None:
  running, runner = gated()
  call = running.generate(token_ids=[1], sampling=LONG, timeout=0.2)
  with pytest.raises(grpc.RpcError):
    next(call)
  assert call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
  running.wait_until_open(0)
  _assert_aborted(running, runner)


def test_abort_ends_the_stream_with_its_usage(
  gated: Callable[..., Any],
) -> None:
  running, runner = gated(max_model_len=4096, num_pages=1024)
  call = running.generate(
    token_ids=[1, 2], request_id='a', sampling={'fill_context': True}
  )
  runner.let(1)
  assert next(call).token_ids[0] == 3
  reply = running.stub.Abort.future(
    pb.AbortRequest(request_ids=['a', 'unknown'])
  )
  fake.step_until_done(reply, runner)
  assert list(reply.result(fake.TIMEOUT_S).aborted) == ['a']
  last = list(call)[-1]
  assert last.finished.finish_reason == pb.FINISH_REASON_ABORT
  assert last.finished.usage.prompt_tokens == 2
  assert last.finished.usage.completion_tokens >= 1
  assert not last.finished.HasField('timing')
  _assert_aborted(running, runner)


def test_a_duplicate_id_is_refused_and_does_not_end_the_first(
  gated: Callable[..., Any],
) -> None:
  running, runner = gated()
  first = running.generate(token_ids=[1], request_id='a', sampling=LONG)
  runner.let(1)
  assert next(first).token_ids[0] == 2
  second = running.generate(token_ids=[30], request_id='a')
  fake.wait_until(lambda: second.done() or bool(runner.let(1)))
  runner.open()
  with pytest.raises(grpc.RpcError):
    next(second)
  assert second.code() is grpc.StatusCode.INVALID_ARGUMENT
  assert "request_id='a'" in second.details()
  assert fake.take(first) == [(1 + k) % 64 for k in range(2, 101)]
  assert running.is_alive()


def test_an_id_may_be_used_again_before_its_reader_has_left(
  gated: Callable[..., Any],
) -> None:
  """It has taken the end, and is about to write it."""
  running, runner = gated()
  runner.open()
  frontend = running.server.frontend
  open_one = functools.partial(
    frontend.open,
    [1],
    types.SamplingParams(max_tokens=2),
    'a',
    caller=frontend_lib.Caller(),
    protocol='test',
  )

  async def both() -> list[int]:
    async with open_one() as first:
      tokens = [t async for delta in first for t in delta.token_ids]
      async with open_one() as second:
        with pytest.raises(errors.InvalidRequestError, match='must be unique'):
          async with open_one():
            pass
        return tokens + [t async for delta in second for t in delta.token_ids]

  assert running.run(both()) == [2, 3, 2, 3]
  running.assert_nothing_is_left()


def test_an_id_may_be_used_again_right_after_a_cancel(
  gated: Callable[..., Any],
) -> None:
  running, runner = gated()
  first = running.generate(token_ids=[1], request_id='a', sampling=LONG)
  runner.let(2)
  assert next(first).token_ids[0] == 2
  first.cancel()
  running.wait_until_open(0)
  second = running.generate(
    token_ids=[30], request_id='a', sampling={'max_tokens': 3}
  )
  running.wait_until_open(1)
  runner.open()
  assert fake.take(second) == [31, 32, 33]
  assert running.is_alive()
