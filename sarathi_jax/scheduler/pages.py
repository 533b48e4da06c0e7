# SPDX-License-Identifier: Apache-2.0
"""The pool of KV cache pages, which sequences may share and find again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from sarathi_jax.scheduler import beginnings
from sarathi_jax.scheduler import page_log


class PagePool:
  """Hands out page numbers, and counts the holders of each page.

  Whoever takes pages holds them, and whoever shares pages holds them, too.
  Each holder gives them back once; the last one's are free. A page that is
  shared is only read, but for tokens that nobody else knows of: who holds it
  with others writes to a copy.

  A full page can be registered under a key that says what it holds. Then it can
  be found, even when it is free, until it is taken for something else. Pages
  without a key are taken first, then those free for the longest; of those given
  back at once, the last first, as nobody can use a page without those before
  it. A page that is not full can be registered, too, by what it holds so far,
  to which whoever finds it has no part but by copying.

  Attributes:
    num_pages, page_size: the cache.
    num_evicted: pages with a key that were taken for something else.
    num_forgotten: keys of full pages that lead nowhere any more, for any
      reason.
    num_registrations: keys that pages got.
    beginnings: of the pages that have a key.
    log: is told which full pages are found no more; None for none.
  """

  def __init__(self, num_pages: int, page_size: int) -> None:
    self.num_pages = num_pages
    self.page_size = page_size
    self.num_evicted = 0
    self.num_forgotten = 0
    self.num_registrations = 0
    self.beginnings = beginnings.Beginnings()
    self.log: page_log.PageLog | None = None
    self._free = list(range(num_pages))[::-1]  # without a key
    self._idle: OrderedDict[int, None] = OrderedDict()  # free, with a key
    self._num_holders = [0] * num_pages
    self._keys: list[bytes | None] = [None] * num_pages
    self._by_key: dict[bytes, int] = {}
    self._in_part: set[bytes] = set()  # keys of pages that are not full

  @property
  def num_free(self) -> int:
    return len(self._free) + len(self._idle)

  @property
  def num_registered(self) -> int:
    return len(self._by_key)

  def num_for(self, num_tokens: int) -> int:
    """Returns the number of pages that hold `num_tokens` tokens."""
    return -(-num_tokens // self.page_size)

  def num_holders(self, page: int) -> int:
    """Returns how many hold a page; 0 if it is free."""
    return self._num_holders[page]

  def take(self, num_pages: int) -> list[int]:
    """Returns free pages, which the caller holds alone."""
    assert num_pages <= self.num_free, (num_pages, self.num_free)
    pages = [
      self._free.pop() if self._free else self._evict()
      for _ in range(num_pages)
    ]
    for page in pages:
      self._num_holders[page] = 1
    return pages

  def take_for_copies(self, sources: Sequence[int]) -> list[tuple[int, int]]:
    """Returns each of some pages, and a page to copy it to.

    Args:
      sources: found by their keys, and not held. Where one of them is the
        last one free, it is its own copy.
    """
    own = self.take(len(sources))
    for i, source in enumerate(sources):
      if source in own:
        j = own.index(source)
        own[i], own[j] = source, own[i]
    return list(zip(sources, own, strict=True))

  def share(self, pages: Sequence[int]) -> list[int]:
    """Returns the same pages, which one more holds now.

    Args:
      pages: held by somebody, or found by their keys.
    """
    for page in pages:
      if not self._num_holders[page]:
        assert self._keys[page], f'page {page} is free'
        del self._idle[page]
      self._num_holders[page] += 1
    return list(pages)

  def give_back(self, pages: Sequence[int]) -> None:
    """Ends the hold on pages; those that nobody else holds are free."""
    for page in reversed(pages):
      assert self._num_holders[page], f'page {page} is free'
      self._num_holders[page] -= 1
      if not self._num_holders[page]:
        self._set_free(page)

  def register(
    self,
    page: int,
    key: bytes,
    parent: bytes = b'',
    tokens: bytes | None = b'',
    *,
    in_part: bool = False,
  ) -> bool:
    """Lets a page that is held be found by what it holds.

    Args:
      page: that holds it. What it held in part before it holds still, and
        more.
      key: of what it holds.
      parent, tokens: see `Beginnings.add`. Without tokens it is found by its
        key alone, and the log is told nothing.
      in_part: whether it is not full.

    Returns:
      Whether it is found from now on. It is not if it was before, or if another
      page is: pages in use are never exchanged.
    """
    assert self._num_holders[page], f'page {page} is free'
    if key in self._by_key:
      return False
    if (old := self._keys[page]) is not None:
      assert old in self._in_part, f'page {page} has a key'
      self._forget(page)
    self.num_registrations += 1
    self._by_key[key] = page
    self._keys[page] = key
    if tokens is not None:
      self.beginnings.add(key, parent, tokens)
    if in_part:
      self._in_part.add(key)
    return True

  def find(
    self, keys: Sequence[bytes], start: int = 0, stop: int | None = None
  ) -> list[int]:
    """Returns pages of keys[start:stop], up to the first that there is none of.

    They are not held: share them before anything else is taken.
    """
    pages = []
    for i in range(start, len(keys) if stop is None else stop):
      page = self._by_key.get(keys[i])
      if page is None:
        break
      pages.append(page)
    return pages

  def page_of(self, key: bytes) -> int | None:
    """Returns the page of a key, as `find` does; None if there is none."""
    return self._by_key.get(key)

  def unregister(self, pages: Sequence[int]) -> None:
    """Lets pages be found no more."""
    for page in pages:
      if self._keys[page] is not None:
        self._unregister(page)

  def unregister_all(self) -> None:
    """Lets no page be found, as none holds any more what it did."""
    log, self.log = self.log, None
    self.unregister(list(self._by_key.values()))
    self.log = log
    if log is not None:
      log.clear()

  def _unregister(self, page: int) -> None:
    self._forget(page)
    if not self._num_holders[page]:
      del self._idle[page]
      self._free.append(page)

  def _set_free(self, page: int) -> None:
    if self._keys[page] is None:
      self._free.append(page)
    else:
      self._idle[page] = None

  def _evict(self) -> int:
    """Returns the page that is free for the longest, without its key."""
    page, _ = self._idle.popitem(last=False)
    self._forget(page)
    self.num_evicted += 1
    return page

  def _forget(self, page: int) -> None:
    """Takes away a page's key."""
    key, self._keys[page] = self._keys[page], None
    assert key is not None
    del self._by_key[key]
    was_told = self.beginnings.remove(key)
    if key in self._in_part:
      self._in_part.remove(key)
      return
    self.num_forgotten += 1
    if self.log is not None and was_told:
      self.log.remove(key)
