# SPDX-License-Identifier: Apache-2.0
"""Prompts that wait for what another is computing, batch by batch."""

from __future__ import annotations

import dataclasses

import pytest

from sarathi_jax.scheduler import prefix_cache
from tests.scheduler import checker as checker_lib
from tests.scheduler import prefix_cache_test
from tests.scheduler import scenarios_test

make, add = prefix_cache_test.make, prefix_cache_test.add
show, steps = scenarios_test.show, prefix_cache_test.steps


def test_what_another_is_computing_is_waited_for() -> None:
  checker = make(token_budget=8)
  add(checker, 'A', 20)
  add(checker, 'B', 22, ('A', 20))
  add(checker, 'C', 10, ('A', 6))
  assert steps(checker) == [
    'A[0,8)',  # A takes all.
    'A[8,16)',
    'A[16,20)',  # B's next page is A's: it waits, and C may not overtake it.
    'B[20,22) C[6,10)',
  ]


def test_what_finds_nothing_waits_for_nothing() -> None:
  """A prompt that is told of is computed, whatever is there."""
  checker = make(token_budget=12)
  add(checker, 'A', 8)
  told = checker_lib.make_request('B', 8, 1, beginnings=(('A', 8),))
  sampling = dataclasses.replace(told.sampling, prompt_logprobs=0)
  checker.add(dataclasses.replace(told, sampling=sampling))
  assert show(checker.schedule()) == 'A[0,8) B[0,4)'


def test_it_waits_no_longer_if_the_other_is_gone() -> None:
  checker = make(token_budget=8, look_ahead=True)
  add(checker, 'A', 10)
  add(checker, 'B', 10, ('A', 10))
  assert show(checker.schedule()) == 'A[0,8)'
  checker.remove('A')
  assert show(checker.schedule()) == 'B[0,8)'
  checker.complete()


def test_it_waits_for_so_many_steps(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(prefix_cache, '_MOST_STEPS', 2)
  checker = make(token_budget=8, max_model_len=64, short_prompt_share=0.5)
  add(checker, 'A', 60)
  assert show(checker.schedule()) == 'A[0,8)'
  checker.complete()
  add(checker, 'B', 40, ('A', 40))
  assert steps(checker)[:4] == [
    'A[8,16)',
    'A[16,24)',
    'A[24,28) B[24,28)',  # As a shorter one that shares nothing would.
    'A[28,32) B[28,32)',
  ]


def test_what_is_in_flight_is_not_found() -> None:
  checker = make(token_budget=8, look_ahead=True)
  add(checker, 'A', 8)
  add(checker, 'B', 8, ('A', 8))
  assert show(checker.schedule()) == 'A[0,8)'
  assert show(checker.schedule()) == ''  # A's pages are not there yet.
  checker.complete()
  assert show(checker.schedule()) == 'B[7,8)'
