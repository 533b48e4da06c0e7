# SPDX-License-Identifier: Apache-2.0
"""The pool of KV cache pages, which sequences may share."""

from __future__ import annotations

from collections.abc import Sequence


class PagePool:
  """Hands out page numbers, and counts the holders of each page.

  Whoever takes pages holds them, and whoever shares pages holds them, too.
  Each holder gives them back once; the last one's are free. A page that is
  shared is only read, but for tokens that nobody else knows of: who holds it
  with others writes to a copy.
  """

  def __init__(self, num_pages: int, page_size: int) -> None:
    self.num_pages = num_pages
    self.page_size = page_size
    self._free = list(range(num_pages))[::-1]
    self._num_holders = [0] * num_pages

  @property
  def num_free(self) -> int:
    return len(self._free)

  def num_for(self, num_tokens: int) -> int:
    """Returns the number of pages that hold `num_tokens` tokens."""
    return -(-num_tokens // self.page_size)

  def num_holders(self, page: int) -> int:
    """Returns how many hold a page; 0 if it is free."""
    return self._num_holders[page]

  def take(self, num_pages: int) -> list[int]:
    """Returns free pages, which the caller holds alone."""
    assert num_pages <= len(self._free), (num_pages, len(self._free))
    pages = [self._free.pop() for _ in range(num_pages)]
    for page in pages:
      self._num_holders[page] = 1
    return pages

  def share(self, pages: Sequence[int]) -> list[int]:
    """Returns the same pages, which one more holds now."""
    for page in pages:
      assert self._num_holders[page], f'page {page} is free'
      self._num_holders[page] += 1
    return list(pages)

  def give_back(self, pages: Sequence[int]) -> None:
    """Ends the hold on pages; those that nobody else holds are free."""
    for page in reversed(pages):
      assert self._num_holders[page], f'page {page} is free'
      self._num_holders[page] -= 1
      if not self._num_holders[page]:
        self._free.append(page)
