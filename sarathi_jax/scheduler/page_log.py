# SPDX-License-Identifier: Apache-2.0
"""Notes what registered pages hold, and what becomes of them, for who follows.

Until somebody follows, it knows what is there; from then on it notes what
comes and goes, in order, for the follower to take. Without a log nothing is
noted: engines whose cache nobody can follow have none.
"""

from __future__ import annotations

from typing import NamedTuple


class Stored(NamedTuple):
  """A page that can be found from now on.

  Attributes:
    key: of the page; see `prefixes`.
    parent: the key of the page before it; None of a sequence's first.
    tokens: its tokens, int32, as bytes.
    namespace: what else its contents depend on, in words; '' for nothing.
  """

  key: bytes
  parent: bytes | None
  tokens: bytes
  namespace: str


class Removed(NamedTuple):
  """A page that can be found no more."""

  key: bytes


class Cleared(NamedTuple):
  """No page can be found any more."""


Event = Stored | Removed | Cleared


class PageLog:
  """The log of one pool; the owner of the pool writes it."""

  def __init__(self) -> None:
    self._there: dict[bytes, Stored] | None = {}  # until somebody follows
    self._events: list[Event] = []

  def store(self, page: Stored) -> None:
    if self._there is None:
      self._events.append(page)
    else:
      self._there[page.key] = page

  def remove(self, key: bytes) -> None:
    if self._there is None:
      self._events.append(Removed(key))
    else:
      del self._there[key]

  def clear(self) -> None:
    if self._there is None:
      self._events.append(Cleared())
    else:
      self._there.clear()

  def follow(self) -> list[Event]:
    """Returns what is there, and notes from now on what becomes of it; once."""
    assert self._there is not None, 'it is followed already'
    there, self._there = self._there, None
    return list(there.values())

  def take(self) -> list[Event]:
    """Returns what was noted since the last call; nothing before `follow`."""
    events, self._events = self._events, []
    return events
