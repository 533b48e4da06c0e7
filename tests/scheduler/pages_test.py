# SPDX-License-Identifier: Apache-2.0
"""The pool of pages, against a model that knows who holds what."""

from __future__ import annotations

from collections import Counter
import random

from hypothesis import stateful
from hypothesis import strategies as st
import pytest

from sarathi_jax.scheduler import pages as pages_lib

NUM_PAGES = 12


class Model:
  """What a pool does, said plainly: lists, and looks through all of them."""

  def __init__(self) -> None:
    self.pool = pages_lib.PagePool(NUM_PAGES, page_size=4)
    self.held: list[list[int]] = []  # by each holder
    self.keys: dict[int, bytes] = {}  # of pages that can be found
    self.idle: list[int] = []  # pages with a key and no holder, oldest first

  def holders(self) -> Counter[int]:
    return Counter(p for pages in self.held for p in pages)

  def take(self, num: int) -> None:
    taken = self.pool.take(num)
    assert len({*taken}) == num and not self.holders().keys() & {*taken}
    # Those without a key first, then the longest idle.
    old = [p for p in taken if p in self.keys]
    assert (
      old == self.idle[: len(old)] and taken[len(taken) - len(old) :] == old
    )
    if old:
      free = {*range(NUM_PAGES)} - self.holders().keys() - {*taken}
      assert free <= {*self.idle}
    for page in old:
      self.idle.remove(page)
      del self.keys[page]
    self.held.append(taken)

  def share(self, pages: list[int]) -> None:
    self.held.append(self.pool.share(pages))
    self.idle = [p for p in self.idle if p not in pages]

  def give_back(self, index: int) -> None:
    pages = self.held.pop(index)
    self.pool.give_back(pages)
    left = self.holders()
    self.idle += [p for p in reversed(pages) if p in self.keys and not left[p]]

  def register(self, page: int, key: bytes) -> None:
    if page in self.keys:
      key = self.keys[page]
    self.pool.register(page, key)
    if key not in self.keys.values():
      self.keys[page] = key

  def unregister(self, pages: list[int]) -> None:
    self.pool.unregister(pages)
    for page in pages:
      self.keys.pop(page, None)
    self.idle = [p for p in self.idle if p not in pages]

  def check(self, *, is_thorough: bool) -> None:
    holders = self.holders()
    assert [self.pool.num_holders(p) for p in range(NUM_PAGES)] == [
      holders[p] for p in range(NUM_PAGES)
    ]
    assert self.pool.num_free == NUM_PAGES - len(holders)
    assert self.pool.num_registered == len(self.keys)
    for page, key in self.keys.items():
      assert self.pool.find([key]) == [page]
    if is_thorough and not self.keys:
      free = self.pool.take(self.pool.num_free)
      assert {*free} == {*range(NUM_PAGES)} - holders.keys()
      self.pool.give_back(free)


class Machine(stateful.RuleBasedStateMachine):
  """Any order of operations by any number of holders."""

  def __init__(self) -> None:
    super().__init__()
    self.model = Model()

  @stateful.rule(num=st.integers(0, NUM_PAGES))
  def take(self, num: int) -> None:
    if num <= self.model.pool.num_free:
      self.model.take(num)

  @stateful.precondition(lambda self: self.model.held)
  @stateful.rule(data=st.data())
  def share(self, data: st.DataObject) -> None:
    pages = data.draw(st.sampled_from(self.model.held))
    self.model.share(pages[: data.draw(st.integers(0, len(pages)))])

  @stateful.precondition(lambda self: self.model.keys)
  @stateful.rule(data=st.data())
  def share_found(self, data: st.DataObject) -> None:
    page = data.draw(st.sampled_from(sorted(self.model.keys)))
    self.model.share(self.model.pool.find([self.model.keys[page]]))

  @stateful.precondition(lambda self: self.model.held)
  @stateful.rule(data=st.data())
  def give_back(self, data: st.DataObject) -> None:
    self.model.give_back(data.draw(st.integers(0, len(self.model.held) - 1)))

  @stateful.precondition(lambda self: any(self.model.held))
  @stateful.rule(data=st.data(), key=st.integers(0, 9))
  def register(self, data: st.DataObject, key: int) -> None:
    page = data.draw(st.sampled_from(sorted(self.model.holders())))
    self.model.register(page, bytes([key]))

  @stateful.rule(pages=st.sets(st.integers(0, NUM_PAGES - 1)))
  def unregister(self, pages: set[int]) -> None:
    self.model.unregister(sorted(pages))

  @stateful.rule()
  def unregister_all(self) -> None:
    self.model.pool.unregister_all()
    self.model.keys, self.model.idle = {}, []

  @stateful.invariant()
  def it_is_as_the_model_says(self) -> None:
    self.model.check(is_thorough=True)


MachineTest = Machine.TestCase


def test_a_hundred_thousand_operations() -> None:
  rng = random.Random(0)
  model = Model()
  for i in range(100_000):
    held = [i for i, pages in enumerate(model.held) if pages]
    what = 'g' if len(held) > 5 else 'ttssggrrrrrfu'
    match rng.choice(what if i % 1000 else 'a'):
      case 't':
        model.take(rng.randint(0, min(4, model.pool.num_free)))
      case 's' if held:
        pages = model.held[rng.choice(held)]
        model.share(pages[: rng.randint(1, len(pages))])
      case 'g' if model.held:
        model.give_back(rng.randrange(len(model.held)))
      case 'r' if held:
        page = rng.choice(model.held[rng.choice(held)])
        model.register(page, bytes([rng.randrange(40)]))
      case 'f' if model.keys:
        model.share(model.pool.find([rng.choice([*model.keys.values()])]))
      case 'u':
        model.unregister([rng.randrange(NUM_PAGES)])
      case 'a':
        model.pool.unregister_all()
        model.keys, model.idle = {}, []
    if not i % 10:
      model.check(is_thorough=False)
  assert model.pool.num_evicted > 1_000


def test_pages_are_found_up_to_the_first_that_is_missing() -> None:
  pool = pages_lib.PagePool(4, page_size=4)
  a, b, c = pool.take(3)
  for page, key in ((a, b'a'), (b, b'b'), (c, b'c')):
    pool.register(page, key)
  assert pool.find([b'a', b'b', b'x', b'c']) == [a, b]
  assert pool.find([b'a', b'b', b'c'], start=1) == [b, c]
  assert pool.find([b'x', b'a']) == []


def test_tails_are_evicted_before_what_they_build_on() -> None:
  pool = pages_lib.PagePool(4, page_size=4)
  pages = pool.take(4)
  for page, key in zip(pages, (b'a', b'b', b'c', b'd'), strict=True):
    pool.register(page, key)
  pool.give_back(pages)
  assert pool.take(1) == pages[3:] and pool.take(2) == [pages[2], pages[1]]
  assert pool.find([b'a', b'b']) == pages[:1]
  assert pool.num_evicted == 3


def test_what_is_not_held_can_be_neither_shared_nor_given_back() -> None:
  pool = pages_lib.PagePool(4, page_size=4)
  (page,) = pool.take(1)
  pool.give_back(pool.share([page]))
  pool.give_back([page])
  for misuse in (
    pool.give_back,
    pool.share,
    lambda pages: pool.register(pages[0], b'key'),
  ):
    with pytest.raises(AssertionError, match=f'page {page} is free'):
      misuse([page])
