# SPDX-License-Identifier: Apache-2.0
"""Finds pages whose first tokens are those that a sequence goes on with.

Pages end where it suits the device, chats and shared instructions anywhere: of
a page of 64 tokens half are alike in the mean, where two sequences part.
"""

from __future__ import annotations

import bisect
import itertools
from typing import NamedTuple

_TOKEN_BYTES = 4  # of an int32
# The pages that are compared, those that came last; more may begin alike, such
# as those of all users behind the same instructions.
_MOST = 8


class Beginnings:
  """Keeps what pages hold, by the key of the page before them."""

  def __init__(self) -> None:
    self._after: dict[bytes, dict[bytes, bytes]] = {}
    self._parents: dict[bytes, bytes] = {}

  def add(self, key: bytes, parent: bytes, tokens: bytes) -> None:
    """Adds a page.

    Args:
      key: of the page.
      parent: of the page before it, or the root; see `prefixes`.
      tokens: its tokens, int32.
    """
    self._after.setdefault(parent, {})[key] = tokens
    self._parents[key] = parent

  def remove(self, key: bytes) -> None:
    """Removes a page that was added."""
    parent = self._parents.pop(key)
    pages = self._after[parent]
    del pages[key]
    if not pages:
      del self._after[parent]

  def find(self, parent: bytes, tokens: bytes) -> Beginning | None:
    """Returns the page after `parent` that begins with the most of `tokens`."""
    newest = reversed(self._after.get(parent, {}).items())
    found = (
      Beginning(key, _num_alike(held, tokens))
      for key, held in itertools.islice(newest, _MOST)
    )
    return max(found, key=lambda beginning: beginning.num_tokens, default=None)


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
