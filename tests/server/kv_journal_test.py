# SPDX-License-Identifier: Apache-2.0
"""Who believes what the journal tells has exactly what prompts would find."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
import random

import pytest

from sarathi_jax import errors
from sarathi_jax.engine import state
from sarathi_jax.scheduler import page_log
from sarathi_jax.scheduler import pages as pages_lib
from sarathi_jax.scheduler import prefixes
from sarathi_jax.server.guard import limits as limits_lib
from sarathi_jax.server.telling import kv_journal

ROOT = prefixes.root()
IDLE = state.Load(0, 0, 9, 0, 0, 0)


def stored(tokens: Sequence[int], namespace: str = '') -> page_log.Stored:
  """The last page of a sequence whose pages are of one token each."""
  keys: list[bytes] = []
  contents: list[bytes] = []
  prefixes.extend(keys, contents, ROOT, tokens, len(tokens), 1)
  parent = keys[-2] if len(keys) > 1 else None
  return page_log.Stored(keys[-1], parent, contents[-1], namespace)


class Follower:
  """Pages by their keys, by what it was told alone."""

  def __init__(self) -> None:
    self.pages: dict[bytes, page_log.Stored] = {}

  def apply(self, event: page_log.Event) -> None:
    match event:
      case page_log.Stored():
        assert event.key not in self.pages
        assert event.parent is None or event.parent in self.pages
        self.pages[event.key] = event
      case page_log.Removed():
        del self.pages[event.key]
        assert all(p.parent != event.key for p in self.pages.values())
      case page_log.Cleared():
        assert self.pages
        self.pages.clear()


def test_any_order_of_events() -> None:
  """Of sequences that compute the same at once, and pages that come and go."""
  rng = random.Random(0)
  pool = pages_lib.PagePool(12, page_size=1)
  log = pool.log = page_log.PageLog()
  view, follower = kv_journal.View(), Follower()
  all_pages: dict[bytes, page_log.Stored] = {}
  # Pages that each holds, its tokens, and how many are registered.
  holders: list[tuple[list[int], list[int], int]] = []
  num_hidden = num_found = 0

  def reachable() -> set[bytes]:
    there = {key for key in all_pages if pool.find([key])}

    def is_reached(key: bytes | None) -> bool:
      return key is None or (key in there and is_reached(all_pages[key].parent))

    return {key for key in there if is_reached(key)}

  is_followed = False
  for i in range(20_000):
    match rng.choice('ttrrrrrrg' if i % 50 else 'ua'[i % 100 == 0]):
      case 't' if pool.num_free >= 4:
        num = rng.randint(1, 4)
        tokens = [rng.randrange(2) for _ in range(num)]
        holders.append((pool.take(num), tokens, 0))
      case 'r' if holders:
        index = rng.randrange(len(holders))
        pages, tokens, num = holders[index]
        if num < len(pages):
          page = stored(tokens[: num + 1])
          all_pages[page.key] = page
          if pool.register(pages[num], page.key):
            log.store(page)
          holders[index] = pages, tokens, num + 1
      case 'g' if holders:
        pool.give_back(holders.pop(rng.randrange(len(holders)))[0])
      case 'u' if holders:
        pool.unregister(rng.choice(holders)[0])
      case 'a' if i % 1000 == 0:
        pool.unregister_all()
    if i < 100:
      continue
    if not is_followed:
      is_followed = True
      events = log.follow()
      assert events
    else:
      events = log.take()
    for event in view.take(iter(events)):
      follower.apply(event)
    assert {*follower.pages} == reachable()
    assert follower.pages == {page.key: page for page in view.pages()}
    num_hidden += bool(view._hidden)
    num_found += bool(follower.pages)
  assert num_hidden > 1000 and num_found > 15_000


class FakeThread:
  """Tells at once what is there."""

  def __init__(self, *there: page_log.Event) -> None:
    self._there = list(there)

  async def follow_pages(
    self, tell: Callable[[list[page_log.Event], state.Load], None]
  ) -> None:
    tell(self._there, IDLE)


def make(
  *there: page_log.Event, max_kv_history: int = 8, **fields: bool
) -> kv_journal.KvJournal:
  thread = FakeThread(*there)
  limits = limits_lib.Limits(max_kv_history=max_kv_history)
  return kv_journal.KvJournal(thread, limits, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize('tells_all', [False, True])
def test_namespaces_are_told_only_to_who_may_know(*, tells_all: bool) -> None:
  async def follow() -> None:
    salted, plain = stored([1], 'salt'), stored([2])
    journal = make(salted, plain, tells_all=tells_all)
    stream = journal.follow()
    expected = (salted, plain) if tells_all else (plain,)
    batch = await anext(stream)
    assert batch.events == (page_log.Cleared(), *expected)
    journal.add(
      [page_log.Removed(salted.key), page_log.Removed(plain.key)], IDLE
    )
    assert len((await anext(stream)).events) == len(expected)
    await stream.aclose()

  asyncio.run(follow())


def test_who_falls_behind_is_told_and_costs_nothing() -> None:
  async def follow() -> None:
    journal = make()
    slow, quick = journal.follow(), journal.follow()
    await anext(slow)
    last = (await anext(quick)).sequence
    for i in range(100):
      journal.add([stored([i])], IDLE)
      assert (await anext(quick)).sequence == last + i + 1
    assert len(journal._history) == 8
    with pytest.raises(errors.MissedError, match='max_kv_history=8'):
      await anext(slow)
    # It begins anew, and one that knows of the last eight goes on.
    again = journal.follow()
    part = (await anext(again)).part
    assert part is not None and (part.num_parts, part.num_pages) == (1, 100)
    resumed = journal.follow(last + 92)
    assert [(await anext(resumed)).sequence for _ in range(8)] == [
      *range(last + 93, last + 101)
    ]
    with pytest.raises(errors.ExpiredError):
      await anext(journal.follow(last + 91))
    for stream in (slow, quick, again, resumed):
      await stream.aclose()
    assert not journal._num_followers

  asyncio.run(follow())


def test_the_load_is_told_with_pages_or_when_it_moves(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  async def follow() -> None:
    journal = make()
    stream = journal.follow()
    first = await anext(stream)

    async def is_told() -> bool:
      told = asyncio.ensure_future(anext(stream))
      await asyncio.sleep(0.05)
      if not told.done():
        journal.add([stored([9])], IDLE)
        assert (await told).events
        journal.add([page_log.Removed(stored([9]).key)], IDLE)
        assert (await anext(stream)).events
        return False
      batch = told.result()
      assert not batch.events and batch.sequence == last
      return True

    last = first.sequence
    busy = IDLE._replace(num_running=1)
    journal.add([], busy)
    journal.add([], busy._replace(num_waiting=3))
    assert await is_told()  # Once, of both.
    journal.add([], busy._replace(num_waiting=3, num_generated=7))
    assert not await is_told()  # Tokens alone are no news.
    assert not await is_told()
    last = journal._sequence
    monkeypatch.setattr(kv_journal, '_SILENCE_S', 0.01)
    journal.add([], busy)
    assert await is_told()
    assert await is_told()  # Though nothing happened.
    await stream.aclose()

  asyncio.run(follow())


def test_batches_are_cut() -> None:
  async def follow() -> None:
    journal = make(*(stored([i]) for i in range(300)), max_kv_history=1000)
    stream = journal.follow()
    parts = [await anext(stream) for _ in range(3)]
    assert [len(batch.events) for batch in parts] == [129, 128, 44]
    journal.add([page_log.Removed(stored([i]).key) for i in range(300)], IDLE)
    journal.add([page_log.Cleared()], IDLE)  # Nothing was there.
    live = [await anext(stream) for _ in range(3)]
    assert [len(batch.events) for batch in live] == [128, 128, 44]
    sequences = [batch.sequence for batch in parts + live]
    assert sequences == [*range(sequences[0], sequences[0] + 6)]
    journal.close()
    with pytest.raises(errors.EngineDeadError):
      await anext(stream)
    with pytest.raises(errors.EngineDeadError):
      await anext(journal.follow())

  asyncio.run(follow())
