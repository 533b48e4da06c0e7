# SPDX-License-Identifier: Apache-2.0
"""A thread that generates while others train, submit and change weights."""

from __future__ import annotations

import asyncio
from concurrent import futures
import sys
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from sarathi_jax import errors
from sarathi_jax import types
from tests.llm import common

GREEDY, PROMPTS = common.GREEDY, common.PROMPTS
LONG = types.SamplingParams(temperature=0, max_tokens=40)
tokens_of = common.tokens_of
TIMEOUT_S = 60


def wait_until(is_so: Any) -> None:
  end = time.monotonic() + TIMEOUT_S
  while not is_so():
    assert time.monotonic() < end
    time.sleep(1e-3)


def test_threads_share_its_steps(llm, greedy):
  with llm.background() as rollouts:
    with futures.ThreadPoolExecutor(3) as pool:
      submitted = list(
        pool.map(lambda _: rollouts.submit(PROMPTS, GREEDY), range(6))
      )
    for future in submitted:
      assert tokens_of(future.result(TIMEOUT_S)) == greedy['old']

    async def ask() -> Any:
      return await asyncio.wrap_future(rollouts.submit(PROMPTS, GREEDY))

    assert tokens_of(asyncio.run(ask())) == greedy['old']
  assert tokens_of(llm.generate(PROMPTS, GREEDY)) == greedy['old']


def test_it_alone_uses_the_llm_until_it_is_closed(llm, greedy):
  with llm.background() as rollouts:
    for use in (lambda: llm.generate(PROMPTS, GREEDY), llm.background):
      with pytest.raises(errors.BusyError, match="'background' is in backgro"):
        use()
    assert rollouts.call(lambda: threading.current_thread().name) == (
      'background'
    )
  for use in (lambda: rollouts.submit([1]), rollouts.pause):
    with pytest.raises(errors.BusyError, match='thread is closed'):
      use()
  rollouts.close()
  assert tokens_of(llm.generate(PROMPTS, GREEDY)) == greedy['old']


def test_new_weights_between_its_steps(llm, new_params, greedy):
  start = llm.engine.weight_version
  with llm.background() as rollouts:
    under_way = rollouts.submit([PROMPTS[0]], LONG)
    wait_until(
      lambda: llm.engine.metrics.num_generated and llm.engine.requests()
    )
    rollouts.update_params(new_params, on_update='keep')
    after = rollouts.submit(PROMPTS, GREEDY)
    (done,) = under_way.result(TIMEOUT_S)
    assert tokens_of(after.result(TIMEOUT_S)) == greedy['new']
  assert sum(span.num_tokens for span in done.versions) == 40
  assert {v for v, _ in done.versions} <= {start, start + 1}


def test_pausing(llm, greedy):
  with llm.background() as rollouts:
    rollouts.pause()
    future = rollouts.submit(PROMPTS, GREEDY)
    num_steps = rollouts.call(lambda: llm.engine.metrics.num_steps)
    with pytest.raises(futures.TimeoutError):
      future.result(0.05)
    assert rollouts.call(lambda: llm.engine.metrics.num_steps) == num_steps
    rollouts.resume()
    assert tokens_of(future.result(TIMEOUT_S)) == greedy['old']


def test_requests_wait_while_it_sleeps_or_weights_are_gone(
  llm, new_params, greedy
):
  with llm.background() as rollouts:
    rollouts.sleep()
    future = rollouts.submit(PROMPTS, GREEDY)
    rollouts.wake()
    assert tokens_of(future.result(TIMEOUT_S)) == greedy['old']
    donated = jax.tree.map(jnp.copy, new_params)
    rollouts.update_params(donated)
    for leaf in jax.tree.leaves(donated):
      leaf.delete()
    future = rollouts.submit(PROMPTS, GREEDY)
    with pytest.raises(futures.TimeoutError):
      future.result(0.05)
    rollouts.update_params(new_params)
    assert tokens_of(future.result(TIMEOUT_S)) == greedy['new']


def test_what_is_cancelled_is_aborted(llm, greedy):
  with llm.background() as rollouts:
    long, other = rollouts.submit([[1]], LONG), rollouts.submit(PROMPTS, GREEDY)
    assert long.cancel()
    assert tokens_of(other.result(TIMEOUT_S)) == greedy['old']
    assert rollouts.call(llm.engine.requests) == []
    left = rollouts.submit([[1]], LONG)
  with pytest.raises(futures.CancelledError):
    left.result(TIMEOUT_S)


def test_what_is_refused_is_told_at_once(llm):
  with llm.background() as rollouts:
    with pytest.raises(errors.InvalidRequestError, match=r'prompts\[1\]'):
      rollouts.submit([[1], [10**6]])
    for wrong in ('x', []):
      with pytest.raises(errors.ConfigError, match='on_update'):
        rollouts.update_params({}, on_update=wrong)
    with pytest.raises(SystemExit):  # Of the caller, not of the thread.
      rollouts.call(sys.exit)


def test_a_fault_reaches_whoever_waits(make_llm, params, monkeypatch):
  llm = make_llm(params)

  def fail(pending: Any) -> Any:
    raise KeyError('x')

  with llm.background() as rollouts:
    monkeypatch.setattr(llm._runner, 'fetch', fail)
    for _ in range(2):
      with pytest.raises(errors.EngineDeadError, match="KeyError: 'x'"):
        rollouts.submit(PROMPTS, GREEDY).result(TIMEOUT_S)
