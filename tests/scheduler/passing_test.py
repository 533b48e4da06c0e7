# SPDX-License-Identifier: Apache-2.0
"""Who passes whom as more of it is in the cache, batch by batch, by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from sarathi_jax.scheduler import passing
from sarathi_jax.scheduler import prefixes
from tests.scheduler import checker as checker_lib
from tests.scheduler import prefix_cache_test

add, steps = prefix_cache_test.add, prefix_cache_test.steps


def make(window: int = 3, **fields: Any) -> checker_lib.Checker:
  """Makes one that runs a sequence at a time, and was asked A and B."""
  checker = prefix_cache_test.make(
    max_num_seqs=1,
    cache_aware_window=window,
    **dict(num_pages=64, token_budget=32) | fields,
  )
  for name in 'AB':
    add(checker, name, 16)
    steps(checker)
  return checker


def order(checker: checker_lib.Checker) -> str:
  """Who began, in order."""
  return ''.join(batch.partition('[')[0] for batch in steps(checker))


def test_of_the_first_few_goes_who_finds_the_most() -> None:
  checker = make()
  add(checker, 'c', 16)
  add(checker, 'd', 20, ('A', 8))
  add(checker, 'e', 20, ('B', 16))
  add(checker, 'f', 20, ('A', 16))
  # The window ends with e; d is passed by e and f, and c by two of these only.
  assert order(checker) == 'efcd'


def test_by_default_first_come_first_served() -> None:
  checker = make(window=1)
  add(checker, 'c', 16)
  add(checker, 'd', 20, ('A', 16))
  assert order(checker) == 'cd'


def test_of_equals_the_first() -> None:
  checker = make()
  for name in 'cdef':
    add(checker, name, 16, ('A', 8))
  assert order(checker) == 'cdef'


@pytest.mark.parametrize('window', [2, 3, 4])
def test_nobody_is_passed_for_ever(window: int) -> None:
  checker = make(window)
  add(checker, 'c', 16)
  for i in range(8):
    add(checker, f'{i}', 20, ('A', 16))
  assert order(checker).index('c') == window - 1


def test_a_turn_is_of_one_priority_and_client() -> None:
  checker = make(window=8)
  add(checker, 'c', 16, priority=1)
  add(checker, 'd', 16, client='ann')
  add(checker, 'e', 20, ('A', 16), client='bob')
  add(checker, 'f', 20, ('A', 16), client='ann')
  add(checker, 'g', 20, ('A', 16), priority=1)
  # f may pass d, but not e, whose turn is before it; g may pass c.
  assert order(checker) == 'defgc'


def test_who_waits_for_another_is_passed_meanwhile() -> None:
  """And what it waits for is registered sooner or later."""
  checker = prefix_cache_test.make(
    max_num_seqs=2, token_budget=8, max_model_len=64, cache_aware_window=2
  )
  add(checker, 'A', 20)
  add(checker, 'B', 22, ('A', 20))
  add(checker, 'c', 4)
  batches = steps(checker)
  assert batches[:3] == ['A[0,8)', 'A[8,16)', 'A[16,20) c[0,4)']
  assert batches[3] == 'B[20,22)'


def test_who_finds_what_is_about_to_be_evicted_goes_first() -> None:
  """What the window is for: d would evict what c finds."""

  def computed(window: int) -> int:
    checker = make(window, num_pages=8, max_model_len=32)
    add(checker, 'c', 30)
    add(checker, 'd', 20, ('B', 16))
    steps(checker)
    return checker.scheduler.num_prefilled

  assert computed(1) - computed(2) == 16


def test_each_is_hashed_once_and_found_by_what_is_new(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  """However long the queue is, and however often somebody looks."""
  checker = make(window=4, num_pages=64)
  hashed: list[int] = []
  extend = prefixes.extend

  def count(keys: list[bytes], *args: Any) -> None:
    before = len(keys)
    extend(keys, *args)
    hashed.append(len(keys) - before)

  monkeypatch.setattr(prefixes, 'extend', count)
  for i in range(50):
    add(checker, f'{i}', 17, ('A', 16))
  add(checker, 'long', 16, max_tokens=30)
  scheduler = checker.scheduler
  looked: list[int] = []
  find = scheduler.pages.find

  def note(keys: Any, start: int = 0, stop: int | None = None) -> list[int]:
    looked.append((len(keys) if stop is None else stop) - start)
    return find(keys, start, stop)

  monkeypatch.setattr(scheduler.pages, 'find', note)
  for _ in range(10):
    scheduler._next_to_admit(0.0)
  assert sum(hashed) == 4 * 4  # Of those in the window, four pages each.
  assert sum(looked) == 4 * 4


@dataclasses.dataclass(eq=False)
class Item:
  found: int
  num_passed: int = 0


def test_guesses_that_were_too_high_are_looked_up() -> None:
  items = [Item(1), Item(4), Item(2), Item(3)]
  guesses = [1, 4, 9, 8]
  asked: list[int] = []

  def find(item: Item) -> int:
    asked.append(item.found)
    guesses[items.index(item)] = item.found
    return item.found

  by_found = passing.by_found(
    items, lambda item: guesses[items.index(item)], find
  )
  assert next(by_found).found == 4
  assert asked == [2, 3, 4]  # The first one need not be looked for.
  assert [item.found for item in by_found] == [3, 2, 1]


def test_who_was_passed_often_ends_the_window() -> None:
  queue = [Item(0, 1), Item(0, 2), Item(9, 0)]
  assert passing.first_few(queue, 3) == queue[:2]
  assert passing.first_few(queue, 4) == queue
  assert passing.first_few(queue, 1) == queue[:1]
  passing.note(queue, queue[2])
  assert [item.num_passed for item in queue] == [2, 3, 0]
