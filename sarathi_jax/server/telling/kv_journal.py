# SPDX-License-Identifier: Apache-2.0
"""What the prefix cache holds, for routers that follow it.

With each change comes the engine's load; and without one, too, when requests
begin or end, and now and then, as a router takes who says nothing for dead.

The journal is told of each page that can be found, or no more, and tells all
who follow. They share its history, which is bounded: each has but a place in
it, and who falls behind its beginning is ended, to start anew from a snapshot.
Before the first one comes nothing is kept here.

A page without all pages before it can't be reached by any prompt. It is not
told of until it can: so a follower always knows the page before, and has
exactly what prompts would find.

Imports no gRPC and no JAX.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Iterator, Sequence
import contextlib
import time
from typing import NamedTuple

from sarathi_jax import errors
from sarathi_jax.engine import state
from sarathi_jax.scheduler import page_log
from sarathi_jax.server.guard import limits as limits_lib
from sarathi_jax.server.queue import engine_thread as engine_thread_lib

Event = page_log.Event
# Making a message of so many holds the event loop for less than a millisecond.
_MOST_EVENTS = 128
_SILENCE_S = 1.0  # after which the load is told, though nothing changed


class Part(NamedTuple):
  """Which part of a snapshot a batch is.

  Attributes:
    place: which it is, from 0.
    num_parts: how many there are.
    num_pages: of the whole snapshot.
  """

  place: int
  num_parts: int
  num_pages: int


class Batch(NamedTuple):
  """What became of pages, in order.

  Attributes:
    sequence: its number, one more than that of the batch before.
    time: when that was, seconds since the epoch.
    events: what became of them; a snapshot begins with `Cleared`. Without any
      the batch is there for the load, and has the number of the one before.
    part: None unless it is a part of a snapshot.
  """

  sequence: int
  time: float
  events: tuple[Event, ...]
  part: Part | None = None


class KvJournal:
  """Tells followers what can be found in the cache; on the event loop.

  Args:
    engine_thread: runs the engine whose cache it is.
    limits: how many may follow, and how much is kept.
    tells_all: whether to tell of pages that only some prompts may find, as
      those of a salt: their namespaces are told, too.
  """

  def __init__(
    self,
    engine_thread: engine_thread_lib.EngineThread,
    limits: limits_lib.Limits,
    *,
    tells_all: bool = False,
  ) -> None:
    self._engine_thread = engine_thread
    self._limits = limits
    self._tells_all = tells_all
    self._beginning: asyncio.Task[None] | None = None
    self._num_followers = 0
    self._is_closed = False
    self._changed = asyncio.Event()
    self._view = View()
    self.load: state.Load | None = None  # the engine's; None: nobody follows
    self._history: deque[Batch] = deque()
    self._num_kept = 0  # events of the history
    # Greater than any of a server that was here before: who was told by that
    # one is to notice.
    self._sequence = time.time_ns() // 1000

  async def prepare(self) -> None:
    """Has the engine keep a log; before there are requests."""
    await self._engine_thread.call(lambda engine: engine.keep_page_log())

  async def follow(self, after: int = 0) -> AsyncGenerator[Batch, None]:
    """Yields what becomes of pages, until the caller closes it.

    Args:
      after: the number of the last batch that the caller has; 0 to begin with
        a snapshot of what is there.

    Raises:
      CapacityError: too many follow.
      ExpiredError: what came after `after` is not known, or no more.
      MissedError: the caller was too slow.
      UnsupportedError: there is no prefix cache.
      EngineDeadError: the engine has stopped, or the server is to.
    """
    with self._counted():
      if self._beginning is None:
        self._beginning = asyncio.create_task(
          self._engine_thread.follow_pages(self.add)
        )
      await asyncio.shield(self._beginning)
      self._check_place(after)
      told = None if after else self.load  # with the snapshot
      if not after:
        after = self._sequence
        for batch in self._snapshot():
          yield batch
      while True:
        if after < self._sequence:
          told = self.load
          yield self._after(after)
          after += 1
        elif _has_moved(told, self.load):
          told = self.load
          yield Batch(after, time.time(), ())
        else:
          changed = self._changed
          self._check_open()
          try:
            async with asyncio.timeout(_SILENCE_S):
              await changed.wait()
          except TimeoutError:
            told = None

  def add(self, events: Sequence[Event], load: state.Load) -> None:
    """Takes in what became of pages, and the load; tells the followers."""
    before, self.load = self.load, load
    told = tuple(
      self._view.take(
        event
        for event in events
        if self._tells_all
        or not isinstance(event, page_log.Stored)
        or not event.namespace
      )
    )
    now = time.time()
    for some in _cut(told):
      self._sequence += 1
      self._history.append(Batch(self._sequence, now, some))
      self._num_kept += len(some)
    while self._num_kept > self._limits.max_kv_history:
      self._num_kept -= len(self._history.popleft().events)
    if told or _has_moved(before, load):
      self._wake()

  def close(self) -> None:
    """Ends all who follow, and whoever would."""
    self._is_closed = True
    self._wake()

  @contextlib.contextmanager
  def _counted(self) -> Iterator[None]:
    most = self._limits.max_kv_subscribers
    if self._num_followers >= most:
      raise errors.CapacityError(
        f'SubscribeKvEvents: {self._num_followers} are told already: must be '
        f'at most max_kv_subscribers={most}.'
      )
    self._check_open()
    self._num_followers += 1
    try:
      yield
    finally:
      self._num_followers -= 1

  def _wake(self) -> None:
    self._changed.set()
    self._changed = asyncio.Event()

  def _check_open(self) -> None:
    if self._is_closed:
      raise errors.EngineDeadError('the server is shutting down')

  @property
  def _first(self) -> int:
    """The number of the first batch that is kept, or will be."""
    return self._history[0].sequence if self._history else self._sequence + 1

  def _check_place(self, after: int) -> None:
    if after and not self._first - 1 <= after <= self._sequence:
      raise errors.ExpiredError(
        f'start_sequence_number={after}: must be in [{self._first - 1}, '
        f'{self._sequence}], or 0 for a snapshot.'
      )

  def _after(self, sequence: int) -> Batch:
    if sequence < self._first - 1:
      raise errors.MissedError(
        'SubscribeKvEvents: more than '
        f'max_kv_history={self._limits.max_kv_history} changes came before '
        'you read on; call with start_sequence_number=0 for a snapshot.'
      )
    return self._history[sequence + 1 - self._first]

  def _snapshot(self) -> Iterator[Batch]:
    """Yields what is there now; numbered so that what comes next follows."""
    pages = self._view.pages()
    last, now = self._sequence, time.time()
    parts = _cut(pages) or [()]
    for place, part in enumerate(parts):
      cleared = () if place else (page_log.Cleared(),)
      yield Batch(
        last + 1 - len(parts) + place,
        now,
        (*cleared, *part),
        Part(place, len(parts), len(pages)),
      )


def _has_moved(before: state.Load | None, load: state.Load | None) -> bool:
  """Says whether requests have begun or ended."""
  return before is None or load is None or before[:2] != load[:2]


def _cut(events: tuple[Event, ...]) -> list[tuple[Event, ...]]:
  """Returns pieces of a size for one batch."""
  return [
    events[i : i + _MOST_EVENTS] for i in range(0, len(events), _MOST_EVENTS)
  ]


class View:
  """The pages that prompts can reach: all before each of them are there."""

  def __init__(self) -> None:
    # In an order in which each is behind the one before it.
    self._pages: dict[bytes, page_log.Stored] = {}
    self._num_children: dict[bytes, int] = {}  # of those, where there are any
    # Those that can't be reached, and what they lack: rare, see `_remove`.
    self._hidden: dict[bytes, page_log.Stored] = {}
    self._lacking: dict[bytes, dict[bytes, None]] = {}

  def pages(self) -> tuple[page_log.Stored, ...]:
    return tuple(self._pages.values())

  def take(self, events: Iterator[Event]) -> Iterator[Event]:
    """Takes in what became of pages; yields it of those that can be reached."""
    for event in events:
      match event:
        case page_log.Stored():
          yield from self._store(event)
        case page_log.Removed():
          yield from self._remove(event)
        case page_log.Cleared():
          if self._pages:
            yield event
          for all_ in (
            self._pages,
            self._num_children,
            self._hidden,
            self._lacking,
          ):
            all_.clear()

  def _store(self, page: page_log.Stored) -> Iterator[Event]:
    if page.parent is not None and page.parent not in self._pages:
      self._hide(page)
      return
    ready = [page]
    while ready:
      page = ready.pop()
      self._pages[page.key] = page
      if page.parent is not None:
        self._num_children[page.parent] = (
          self._num_children.get(page.parent, 0) + 1
        )
      ready += map(self._hidden.pop, self._lacking.pop(page.key, ()))
      yield page

  def _remove(self, event: page_log.Removed) -> Iterator[Event]:
    """Removes a page, and before it hides what only it makes reachable.

    The pool takes a sequence's last pages first. But where two sequences
    compute the same at once, only one's pages can be found, and they may go
    before what follows those of the other.
    """
    hidden = self._hidden.pop(event.key, None)
    if hidden is not None:
      assert hidden.parent is not None
      lacking = self._lacking[hidden.parent]
      del lacking[event.key]
      if not lacking:
        del self._lacking[hidden.parent]
      return
    if event.key not in self._pages:
      return  # It was not told of.
    if event.key in self._num_children:
      behind = {event.key: None}
      for page in self._pages.values():
        if page.parent in behind:
          behind[page.key] = None
      del behind[event.key]
      for key in reversed(behind):
        self._hide(self._drop(key))
        yield page_log.Removed(key)
    self._drop(event.key)
    yield event

  def _drop(self, key: bytes) -> page_log.Stored:
    page = self._pages.pop(key)
    if page.parent is not None:
      num = self._num_children.pop(page.parent) - 1
      if num:
        self._num_children[page.parent] = num
    return page

  def _hide(self, page: page_log.Stored) -> None:
    assert page.parent is not None
    self._hidden[page.key] = page
    self._lacking.setdefault(page.parent, {})[page.key] = None
