# SPDX-License-Identifier: Apache-2.0
"""Threads at one LLM: who comes second is told so, and nothing is lost."""

from __future__ import annotations

from collections.abc import Callable
import gc
import threading
from typing import Any

import pytest

from sarathi_jax import errors
from sarathi_jax import types
from tests.llm import common

GREEDY, PROMPTS = common.GREEDY, common.PROMPTS
tokens_of = common.tokens_of


class Held:
  """A thread, 'first', that is in the middle of a step of `generate`."""

  def __init__(self, llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    self.done: list[types.Completion] = []
    self._inside, self._go_on = threading.Event(), threading.Event()
    launch = llm._runner.launch

    def wait_and_launch(batch: types.ScheduledBatch) -> Any:
      if threading.current_thread() is self._thread:
        self._inside.set()
        assert self._go_on.wait(60)
      return launch(batch)

    monkeypatch.setattr(llm._runner, 'launch', wait_and_launch)
    self._thread = threading.Thread(
      target=lambda: self.done.extend(llm.generate(PROMPTS, GREEDY)),
      name='first',
    )

  def __enter__(self) -> Held:
    self._thread.start()
    assert self._inside.wait(60)
    return self

  def __exit__(self, *error: Any) -> None:
    self._go_on.set()
    self._thread.join(60)
    assert not self._thread.is_alive()


@pytest.mark.parametrize(
  'what,call',
  [
    ('generate', lambda llm, params: llm.generate(PROMPTS, GREEDY)),
    ('stream', lambda llm, params: next(llm.stream(PROMPTS[0], GREEDY))),
    ('update_params', lambda llm, params: llm.update_params(params)),
    ('load_weights', lambda llm, params: llm.load_weights(None)),
  ],
)
def test_who_comes_second_is_told_of_the_first(
  llm,
  greedy,
  new_params,
  monkeypatch,
  what: str,
  call: Callable[[Any, Any], Any],
) -> None:
  with Held(llm, monkeypatch) as first:
    with pytest.raises(errors.BusyError) as caught:
      call(llm, new_params)
    for words in (what, "thread 'first' is in generate", 'Nothing was done'):
      assert words in str(caught.value)
  assert tokens_of(first.done) == greedy['old']
  assert tokens_of(llm.generate(PROMPTS, GREEDY)) == greedy['old']


def test_a_stream_that_was_told_so_is_read_on(llm, greedy, monkeypatch) -> None:
  stream = llm.stream(PROMPTS[0], GREEDY)
  got = list(next(stream).token_ids)
  with (
    Held(llm, monkeypatch) as first,
    pytest.raises(errors.BusyError, match='first'),
  ):
    for delta in stream:  # What the steps before brought comes first.
      got += delta.token_ids
  for delta in stream:
    got += delta.token_ids
  assert tuple(got) == greedy['old'][0]
  assert tokens_of(first.done) == greedy['old']


def test_a_stream_that_is_left_meanwhile_frees_its_pages(
  llm, greedy, monkeypatch
) -> None:
  """At the next step: the one under way can't be disturbed."""
  stream = llm.stream(PROMPTS[0], GREEDY)
  next(stream)
  with Held(llm, monkeypatch) as first:
    stream.close()
  assert tokens_of(first.done) == greedy['old']
  assert llm.engine.stats().num_running == 0


def test_the_garbage_collector_does_not_disturb_a_step(
  llm, greedy, monkeypatch
) -> None:
  """A stream in a cycle is forgotten while its engine is in a step."""
  gc.collect()
  gc.freeze()  # or each step would look through all that was ever traced
  stream: Any = llm.stream(PROMPTS[0], GREEDY)
  next(stream)
  stream.myself = stream
  del stream
  launch = llm._runner.launch

  def collect_and_launch(batch: types.ScheduledBatch) -> Any:
    before = llm.engine.metrics.num_aborted
    gc.collect()
    assert llm.engine.metrics.num_aborted == before
    return launch(batch)

  monkeypatch.setattr(llm._runner, 'launch', collect_and_launch)
  try:
    tokens = tokens_of(llm.generate(PROMPTS, GREEDY))
  finally:
    gc.unfreeze()
  assert tokens == greedy['old']
  assert llm.engine.stats().num_running == 0


@pytest.mark.parametrize(
  'fault,words',
  [
    (AssertionError(), 'AssertionError'),
    (KeyError('x'), "KeyError: 'x'"),
    (RuntimeError('RESOURCE_EXHAUSTED: memory'), 'RESOURCE_EXHAUSTED: memory'),
  ],
)
def test_a_faults_message_is_never_empty(
  make_llm, params, monkeypatch, fault, words
) -> None:
  llm = make_llm(params)

  def fail(pending: Any) -> Any:
    raise fault

  monkeypatch.setattr(llm._runner, 'fetch', fail)
  for _ in range(2):
    with pytest.raises(errors.EngineDeadError) as caught:
      llm.generate(PROMPTS, GREEDY)
    assert words in str(caught.value)
