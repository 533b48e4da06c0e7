# SPDX-License-Identifier: Apache-2.0
"""The engine's thread by itself: nothing is lost, doubled or left behind."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
import contextlib
import functools
import random
import threading
import time
from typing import Any

import pytest

from sarathi_jax import errors
from sarathi_jax import types
from sarathi_jax.engine import engine as engine_lib
from sarathi_jax.server.queue import engine_thread
from sarathi_jax.server.queue import outbox
from sarathi_jax.server.queue import pausing
from tests.server import fake


def _request(
  request_id: str, *, max_tokens: int = 5, first: int = 1
) -> types.Request:
  return types.Request(
    request_id=request_id,
    prompt_token_ids=(first,),
    sampling=types.SamplingParams(max_tokens=max_tokens),
  )


def _run(
  scenario: Callable[[engine_thread.EngineThread, Any], Awaitable[None]],
  make: Callable[[], engine_lib.Engine] = fake.make_engine,
) -> None:
  """Runs a scenario beside a started engine thread."""

  async def run() -> None:
    thread = engine_thread.EngineThread(
      make, asyncio.get_running_loop(), lambda fault: None
    )
    engine = await thread.start()
    try:
      await scenario(thread, engine)
    finally:
      thread.stop()
      assert thread.join(fake.TIMEOUT_S)

  asyncio.run(asyncio.wait_for(run(), fake.TIMEOUT_S))


async def _tokens(stream: outbox.Stream) -> list[int]:
  return [t async for delta in stream for t in delta.token_ids]


def test_idle_thread_sleeps_and_wakes() -> None:
  async def scenario(thread: engine_thread.EngineThread, engine: Any) -> None:
    steps = []
    step = engine.step
    engine.step = lambda: steps.append(1) or step()
    assert await _tokens(thread.submit(_request('a'))) == [2, 3, 4, 5, 6]
    num_steps = len(steps)
    await asyncio.sleep(0.05)
    assert len(steps) - num_steps <= 1  # what was in flight, then nothing
    assert await _tokens(thread.submit(_request('a'))) == [2, 3, 4, 5, 6]

  _run(scenario)


def test_one_callback_a_step() -> None:
  async def scenario(thread: engine_thread.EngineThread, engine: Any) -> None:
    loop = asyncio.get_running_loop()
    calls = []
    post = loop.call_soon_threadsafe

    def spy(*args: Any, **kwargs: Any) -> Any:
      calls.append(args[0])
      return post(*args, **kwargs)

    streams = [thread.submit(_request(str(i), max_tokens=20)) for i in range(4)]
    loop.call_soon_threadsafe = spy  # type: ignore[method-assign]
    await asyncio.gather(*map(_tokens, streams))
    assert len(calls) <= engine.metrics.num_steps < 80

  _run(scenario)


def test_who_comes_while_a_step_computes_is_in_the_next(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  due = [1e9]
  monkeypatch.setattr(
    engine_lib.Engine, 'step_at', property(lambda engine: due[0])
  )

  async def scenario(thread: engine_thread.EngineThread, engine: Any) -> None:
    streams = []
    for request_id in 'ab':
      streams.append(thread.submit(_request(request_id)))
      for _ in range(2):  # Commands don't wait; what came before is taken.
        states = await thread.call(lambda engine: engine.requests())
    assert [s.request_id for s in states] == ['a', 'b']
    assert not engine.metrics.num_steps
    due[0] = 0.0
    await thread.call(lambda engine: None)
    assert await asyncio.gather(*map(_tokens, streams)) == 2 * [[2, 3, 4, 5, 6]]
    assert engine.metrics.num_steps == 5

  _run(scenario)


def test_a_refusal_reaches_its_own_stream_only() -> None:
  async def scenario(thread: engine_thread.EngineThread, engine: Any) -> None:
    add = engine.add

    def add_or_refuse(request: types.Request) -> None:
      if request.request_id == 'b':
        raise errors.InvalidRequestError('b')
      add(request)

    engine.add = add_or_refuse
    first = thread.submit(_request('a'))
    second = thread.submit(_request('b'))
    with pytest.raises(errors.InvalidRequestError):
      await _tokens(second)
    second.close()
    assert await _tokens(first) == [2, 3, 4, 5, 6]

  _run(scenario)


def test_a_request_that_takes_long_to_add_holds_up_no_other() -> None:
  """As a prompt of 100,000 tokens does, which are copied and decoded."""

  async def scenario(thread: engine_thread.EngineThread, engine: Any) -> None:
    add, is_adding, go_on = engine.add, threading.Event(), threading.Event()

    def slow(request: types.Request) -> None:
      is_adding.set()
      assert go_on.wait(fake.TIMEOUT_S / 2)
      add(request)

    engine.add = slow
    first = thread.submit(_request('a'))
    await asyncio.to_thread(is_adding.wait)
    submitted = asyncio.create_task(
      asyncio.to_thread(thread.submit, _request('b', first=30))
    )
    done, _ = await asyncio.wait([submitted], timeout=fake.TIMEOUT_S / 4)
    go_on.set()
    assert done, 'it waits for the other one'
    assert await _tokens(first) == [2, 3, 4, 5, 6]
    assert await _tokens(await submitted) == [31, 32, 33, 34, 35]

  _run(scenario)


def test_a_stream_ends_after_its_last_delta() -> None:
  async def scenario(thread: engine_thread.EngineThread, engine: Any) -> None:
    stream = thread.submit(_request('a'))
    await _tokens(stream)
    assert await _tokens(stream) == []
    stream.close()  # is not an abort
    await thread.call(lambda engine: None)
    assert engine.metrics.num_aborted == 0

  _run(scenario)


class _FaultyEngine(engine_lib.Engine):
  def step(self) -> list[types.OutputDelta]:
    if len(self._live) == 3:
      raise RuntimeError('the device is gone')
    return super().step()


def test_a_fault_fails_every_request_and_all_later_ones(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  monkeypatch.setattr(engine_lib, 'Engine', _FaultyEngine)
  deaths = []

  async def scenario() -> None:
    thread = engine_thread.EngineThread(
      fake.make_engine, asyncio.get_running_loop(), deaths.append
    )
    await thread.start()
    streams = [
      thread.submit(_request(str(i), max_tokens=100)) for i in range(3)
    ]
    for outcome in await asyncio.gather(
      *map(_tokens, streams), return_exceptions=True
    ):
      assert isinstance(outcome, errors.EngineDeadError)
      assert 'the device is gone' not in str(outcome)  # may have paths
      assert isinstance(outcome.__cause__, RuntimeError)
    with pytest.raises(errors.EngineDeadError):
      await _tokens(thread.submit(_request('late')))
    with pytest.raises(errors.EngineDeadError):
      await thread.abort(['0'], None)
    assert thread.join(fake.TIMEOUT_S)
    await asyncio.sleep(0)
    assert [str(d) for d in deaths] == ['the device is gone']

  asyncio.run(scenario())


def test_a_call_that_loses_the_engine_ends_it() -> None:
  """As weights that can't be read, where the old ones are gone."""
  deaths = []

  def lose(fault: Exception) -> Any:
    raise fault

  async def scenario() -> None:
    thread = engine_thread.EngineThread(
      fake.make_engine, asyncio.get_running_loop(), deaths.append
    )
    await thread.start()
    with pytest.raises(errors.ConfigError):  # Any other harms nobody.
      await thread.call(lambda engine: lose(errors.ConfigError('a')))
    stream = thread.submit(_request('a', max_tokens=100_000))
    fault = errors.EngineDeadError('the weights are gone')
    with pytest.raises(errors.EngineDeadError, match='the weights are gone'):
      await thread.call(lambda engine: lose(fault))
    with pytest.raises(errors.EngineDeadError, match='after a fault'):
      await _tokens(stream)
    assert thread.join(fake.TIMEOUT_S)
    await asyncio.sleep(0)
    assert deaths == [fault] and not thread.is_up

  asyncio.run(scenario())


def test_stop_fails_what_is_left() -> None:
  async def scenario(thread: engine_thread.EngineThread, engine: Any) -> None:
    stream = thread.submit(_request('a', max_tokens=100))
    thread.stop()
    with pytest.raises(errors.EngineDeadError, match='shutting down'):
      await _tokens(stream)

  _run(scenario)


def test_an_engine_that_can_not_be_made_fails_the_start_and_submits() -> None:
  def fail() -> engine_lib.Engine:
    raise errors.CheckpointError("checkpoint='x': no such folder.")

  async def scenario() -> None:
    thread = engine_thread.EngineThread(
      fail, asyncio.get_running_loop(), lambda fault: None
    )
    with pytest.raises(errors.CheckpointError, match='no such folder'):
      await thread.start()
    with pytest.raises(errors.EngineDeadError):
      await _tokens(thread.submit(_request('a')))

  asyncio.run(scenario())


def test_everything_runs_on_one_thread() -> None:
  threads = set()

  def make() -> engine_lib.Engine:
    threads.add(threading.get_ident())
    return fake.make_engine()

  async def scenario(thread: engine_thread.EngineThread, engine: Any) -> None:
    def spy(method: Callable[..., Any], *args: Any) -> Any:
      threads.add(threading.get_ident())
      return method(*args)

    for name in ('add', 'abort', 'step', 'stats'):
      setattr(engine, name, functools.partial(spy, getattr(engine, name)))
    thread.submit(_request('b', max_tokens=100)).close()
    await _tokens(thread.submit(_request('a')))
    await thread.call(lambda engine: engine.stats())

  _run(scenario, make)
  assert len(threads) == 1 and threading.get_ident() not in threads


@pytest.mark.parametrize('seed', range(3))
def test_random_closes_and_aborts_lose_nothing(seed: int) -> None:
  """Scarce pages, so that preemption is in the play, too."""
  rng = random.Random(seed)

  async def client(thread: engine_thread.EngineThread, i: int) -> None:
    leaves_at_once = i % 10 == 9
    max_tokens = 60 if leaves_at_once else rng.randint(1, 60)
    first = rng.randrange(64)
    stream = thread.submit(_request(str(i), max_tokens=max_tokens, first=first))
    leave_after = rng.choice([0, 1, 5, 1000])
    tokens: list[int] = []
    with contextlib.closing(stream):
      if leaves_at_once:
        return
      async for delta in stream:
        tokens += delta.token_ids
        if delta.finish_reason is types.FinishReason.ABORT:
          break
        if len(tokens) > leave_after:
          break
        if rng.random() < 0.01:
          await thread.abort([str(i)], None)
      else:
        assert len(tokens) == max_tokens
    assert tokens == [(first + 1 + k) % 64 for k in range(len(tokens))]

  async def scenario(thread: engine_thread.EngineThread, engine: Any) -> None:
    await asyncio.gather(*(client(thread, i) for i in range(150)))
    stats = await thread.call(lambda engine: engine.stats())
    assert stats.num_running == stats.num_waiting == 0
    assert stats.num_free_pages == stats.num_pages
    assert not thread._streams
    assert not thread.num_queued

  _run(scenario, lambda: fake.make_engine(num_pages=32))


def test_who_waits_for_a_pause_may_leave() -> None:
  async def scenario(thread: engine_thread.EngineThread, engine: Any) -> None:
    step = engine.step
    engine.step = lambda: time.sleep(0.01) or step()
    stream = thread.submit(_request('a', max_tokens=20))
    await anext(stream)
    with pytest.raises(asyncio.TimeoutError):
      await asyncio.wait_for(thread.pause(pausing.PauseMode.WAIT), 0.03)
    assert len(await _tokens(stream)) == 19
    await thread.resume()  # the engine goes on
    assert await _tokens(thread.submit(_request('b'))) == [2, 3, 4, 5, 6]

  _run(scenario)
