# SPDX-License-Identifier: Apache-2.0
"""The pool of KV cache pages."""

from __future__ import annotations


class PagePool:
  """Hands out page numbers. Whoever takes pages gives them back."""

  def __init__(self, num_pages: int, page_size: int) -> None:
    self.num_pages = num_pages
    self.page_size = page_size
    self._free = list(range(num_pages))[::-1]

  @property
  def num_free(self) -> int:
    return len(self._free)

  def num_for(self, num_tokens: int) -> int:
    """Returns the number of pages that hold `num_tokens` tokens."""
    return -(-num_tokens // self.page_size)

  def take(self, num_pages: int) -> list[int]:
    assert num_pages <= len(self._free), (num_pages, len(self._free))
    return [self._free.pop() for _ in range(num_pages)]

  def give_back(self, pages: list[int]) -> None:
    self._free.extend(reversed(pages))
    assert len(self._free) <= self.num_pages
