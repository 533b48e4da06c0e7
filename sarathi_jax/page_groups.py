# SPDX-License-Identifier: Apache-2.0
"""Counts the pages of sequences whose layers need different parts of them.

Layers form groups (`models.layer_groups`), each with a sliding window, or none.
A sequence has a page of every group for each `page_size` of its tokens, a
*place*. Those that lie wholly before a group's window are given back.
Arithmetic only; standard library.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable

Windows = tuple[int | None, ...]  # of each group; the widest first
ONE_GROUP: Windows = (None,)

# In place of a page that was given back, in lists of a sequence's pages.
NOWHERE = -1


def first_place(window: int | None, num_tokens: int, page_size: int) -> int:
  """Returns the first place that is needed after so many tokens.

  Args:
    window: of the group.
    num_tokens: in the cache; what is computed next is at this position.
    page_size: tokens in a page.
  """
  if window is None:
    return 0
  return max(num_tokens - window + 1, 0) // page_size


def num_pages(
  windows: Windows, num_tokens: int, page_size: int, chunk: int = 1
) -> int:
  """Returns the most pages that a sequence of so many tokens holds at once.

  Worked example: 100 tokens, page_size=8, windows=(None, 20). 13 pages of the
  one group; of the other 4, as 20 tokens may begin at a page's end.

  Args:
    windows: of the groups.
    num_tokens: of the sequence.
    page_size: tokens in a page.
    chunk: the most of its tokens that are computed at once.
  """
  places = -(-num_tokens // page_size)
  return sum(
    places
    if window is None
    else min(places, (window + chunk + page_size - 3) // page_size + 1)
    for window in windows
  )


def longest(
  windows: Windows, pages: int, page_size: int, most: int, chunk: int = 1
) -> int:
  """Returns the tokens, up to `most`, of a sequence that so many pages hold."""
  return bisect.bisect_right(
    range(1, most + 1),
    pages,
    key=lambda n: num_pages(windows, n, page_size, min(chunk, n)),
  )


def num_tokens(
  windows: Windows, pages: int, page_size: int, max_model_len: int
) -> int:
  """Returns the tokens that a cache holds, of sequences of `max_model_len`."""
  if windows == ONE_GROUP:
    return pages * page_size
  each = num_pages(windows, max_model_len, page_size)
  return pages * max_model_len // each


def held(pages: Iterable[int]) -> list[int]:
  """Returns the pages of a list that were not given back."""
  return [page for page in pages if page != NOWHERE]
