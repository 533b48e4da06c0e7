# SPDX-License-Identifier: Apache-2.0
"""The pool of pages, against a model that knows who holds what."""

from __future__ import annotations

from collections import Counter

from hypothesis import stateful
from hypothesis import strategies as st
import pytest

from sarathi_jax.scheduler import pages as pages_lib

NUM_PAGES = 12


class Machine(stateful.RuleBasedStateMachine):
  """Any order of takes, shares and returns by any number of holders."""

  def __init__(self) -> None:
    super().__init__()
    self.pool = pages_lib.PagePool(NUM_PAGES, page_size=4)
    self.held: list[list[int]] = []  # by each holder

  @stateful.rule(num=st.integers(0, NUM_PAGES))
  def take(self, num: int) -> None:
    if num <= self.pool.num_free:
      taken = self.pool.take(num)
      assert not {p for pages in self.held for p in pages} & set(taken)
      self.held.append(taken)

  @stateful.precondition(lambda self: self.held)
  @stateful.rule(data=st.data())
  def share(self, data: st.DataObject) -> None:
    pages = data.draw(st.sampled_from(self.held))
    num = data.draw(st.integers(0, len(pages)))
    self.held.append(self.pool.share(pages[:num]))

  @stateful.precondition(lambda self: self.held)
  @stateful.rule(data=st.data())
  def give_back(self, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(self.held) - 1))
    self.pool.give_back(self.held.pop(index))

  @stateful.invariant()
  def each_page_is_free_or_held(self) -> None:
    holders = Counter(p for pages in self.held for p in pages)
    assert [self.pool.num_holders(p) for p in range(NUM_PAGES)] == [
      holders[p] for p in range(NUM_PAGES)
    ]
    assert self.pool.num_free == NUM_PAGES - len(holders)
    free = self.pool.take(self.pool.num_free)
    assert {*free} == {*range(NUM_PAGES)} - holders.keys()
    self.pool.give_back(free)


MachineTest = Machine.TestCase


def test_what_is_not_held_can_be_neither_shared_nor_given_back() -> None:
  pool = pages_lib.PagePool(4, page_size=4)
  (page,) = pool.take(1)
  pool.give_back(pool.share([page]))
  pool.give_back([page])
  with pytest.raises(AssertionError, match=f'page {page} is free'):
    pool.give_back([page])
  with pytest.raises(AssertionError, match=f'page {page} is free'):
    pool.share([page])
