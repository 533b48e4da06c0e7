# SPDX-License-Identifier: Apache-2.0
"""Finds pages whose first tokens are those that a sequence goes on with.

Pages end where it suits the device, chats and shared instructions anywhere: of
a page of 64 tokens half are alike in the mean, where two sequences part.
"""

from __future__ import annotations

import bisect
from typing import NamedTuple

_TOKEN_BYTES = 4  # of an int32
# The pages that are compared, those that came last; more may begin alike, such
# as those of all users behind the same instructions.
_MOST = 8


class Beginnings:
  """Keeps what pages hold, and which came last after each page.

  Nearly all pages are the only ones behind theirs, so the others are a chain,
  which ends where one was removed.
  """

  def __init__(self) -> None:
    self._pages: dict[bytes, tuple[bytes, bytes]] = {}  # key -> parent, tokens
    self._latest: dict[bytes, bytes] = {}  # parent -> key
    self._older: dict[bytes, bytes] = {}  # key -> the one of its parent before

  def add(self, key: bytes, parent: bytes, tokens: bytes) -> None:
    """Adds a page.

    Args:
      key: of the page.
      parent: of the page before it, or the root; see `prefixes`.
      tokens: its tokens, int32.
    """
    self._pages[key] = parent, tokens
    if parent in self._latest:
      self._older[key] = self._latest[parent]
    self._latest[parent] = key

  def remove(self, key: bytes) -> bool:
    """Removes a page; returns whether it was added."""
    if key not in self._pages:
      return False
    parent, _ = self._pages.pop(key)
    older = self._older.pop(key, b'')
    if self._latest.get(parent) != key:
      return True
    if older in self._pages:
      self._latest[parent] = older
    else:
      del self._latest[parent]
    return True

  def find(self, parent: bytes, tokens: bytes) -> Beginning | None:
    """Returns the page after `parent` that begins with the most of `tokens`."""
    best = None
    key = self._latest.get(parent, b'')
    for _ in range(_MOST):
      if key not in self._pages:
        break
      num_tokens = _num_alike(self._pages[key][1], tokens)
      if best is None or num_tokens > best.num_tokens:
        best = Beginning(key, num_tokens)
      key = self._older.get(key, b'')
    return best


class Beginning(NamedTuple):
  """A page of which the first tokens can be used.

  Attributes:
    key: of the page.
    num_tokens: how many of them.
  """

  key: bytes
  num_tokens: int


def _num_alike(a: bytes, b: bytes) -> int:
  """Returns how many first tokens of a and b are the same."""
  most = min(len(a), len(b)) // _TOKEN_BYTES
  return bisect.bisect_left(
    range(1, most + 1),
    True,
    key=lambda n: a[: n * _TOKEN_BYTES] != b[: n * _TOKEN_BYTES],
  )
