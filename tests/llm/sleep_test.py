# SPDX-License-Identifier: Apache-2.0
"""An LLM that gives its KV cache's memory to a trainer, and takes it again."""

from __future__ import annotations

import jax
import pytest

from sarathi_jax import errors
from tests import tiny
from tests.llm import common

GREEDY, PROMPTS = common.GREEDY, common.PROMPTS
tokens_of = common.tokens_of


def _bytes() -> int:
  return sum(array.nbytes for array in jax.live_arrays())


@pytest.fixture
def llm(make_llm, params):
  return make_llm(params)


def test_sleeping_gives_the_cache_back_time_after_time(llm, greedy):
  cache = sum(leaf.nbytes for leaf in jax.tree.leaves(llm._runner._state.kv))
  assert cache > 0
  llm.sleep()
  llm.wake()  # The first time, what fills arrays with zeros is compiled.
  with tiny.count_compiles() as compiled:
    for turn in range(50):
      before = _bytes()
      llm.sleep()
      assert _bytes() <= before - cache
      llm.wake()
      assert _bytes() == before
      if not turn % 10:
        assert tokens_of(llm.generate(PROMPTS, GREEDY)) == greedy['old']
  assert compiled == []


def test_twice_is_once(llm, greedy):
  llm.wake()
  llm.sleep()
  llm.sleep()
  llm.wake()
  llm.wake()
  assert tokens_of(llm.generate(PROMPTS, GREEDY)) == greedy['old']


def test_what_is_under_way_goes_on(llm, greedy):
  stream = llm.stream(PROMPTS[2], GREEDY)
  tokens = list(next(stream).token_ids)
  llm.sleep()
  with pytest.raises(errors.BusyError, match='call wake first'):
    for delta in stream:  # What was in flight is still told.
      tokens += delta.token_ids
  llm.wake()
  for delta in stream:
    tokens += delta.token_ids
  assert tuple(tokens) == greedy['old'][2]
  assert delta.metrics.num_preemptions == 1


def test_nothing_is_computed_meanwhile_and_nothing_is_lost(llm, greedy):
  llm.sleep()
  for compute in (
    lambda: llm.generate(PROMPTS, GREEDY),
    lambda: llm.score(PROMPTS, [[1]] * 3),
  ):
    with pytest.raises(errors.BusyError, match='call wake first'):
      compute()
  assert llm.reset_prefix_cache()
  llm.wake()
  assert tokens_of(llm.generate(PROMPTS, GREEDY)) == greedy['old']


def test_new_weights_may_come_meanwhile(llm, new_params, greedy):
  tokens_of(llm.generate(PROMPTS, GREEDY))  # of which nothing may be found
  llm.sleep()
  llm.update_params(new_params)
  llm.wake()
  assert tokens_of(llm.generate(PROMPTS, GREEDY)) == greedy['new']


def test_it_sleeps_on_where_there_is_no_memory(llm, greedy, monkeypatch):
  llm.sleep()
  with monkeypatch.context() as patch:

    def refuse() -> None:
      raise errors.ConfigError('num_pages=1: are more than the device has')

    patch.setattr(llm._runner, 'wake', refuse)
    with pytest.raises(errors.ConfigError, match='num_pages'):
      llm.wake()
  with pytest.raises(errors.BusyError, match='call wake first'):
    llm.generate(PROMPTS, GREEDY)
  llm.wake()
  assert tokens_of(llm.generate(PROMPTS, GREEDY)) == greedy['old']
