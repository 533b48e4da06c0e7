# SPDX-License-Identifier: Apache-2.0
"""Pages of sequences whose layers form groups, each with a window of its own.

A sequence's `pages` has one of every group for each place, in the groups' order
(`SchedulerConfig.windows`). Pages that lie wholly before a group's window of
all tokens yet to be computed go back to the pool, which may still find them by
their keys; NOWHERE stands for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sarathi_jax import page_groups
from sarathi_jax.scheduler import pages as pages_lib
from sarathi_jax.scheduler import sequence

NOWHERE = page_groups.NOWHERE


def table_of(pages: Sequence[int]) -> tuple[int, ...]:
  """Returns a sequence's pages as chunks have them.

  Page 0 stands for those that were given back: attention reads none of them,
  but their numbers have to be those of pages.
  """
  if NOWHERE not in pages:
    return tuple(pages)
  return tuple([page if page != NOWHERE else 0 for page in pages])


def num_behind(pages: Sequence[int], num_groups: int) -> list[int]:
  """Returns the pages of each group that are not held."""
  return [
    pages[group::num_groups].count(NOWHERE) for group in range(num_groups)
  ]


def num_held(seq: sequence.Sequence) -> int:
  """Returns the number of pages that a sequence holds."""
  return len(seq.pages) - sum(seq.num_behind)


def give_back_behind(
  seq: sequence.Sequence,
  num_tokens: int,
  windows: page_groups.Windows,
  pool: pages_lib.PagePool,
) -> None:
  """Gives back the pages that no token from `num_tokens` on attends to.

  The page table that chunks have stays as it is until a page is added.

  Args:
    seq: a running sequence.
    num_tokens: what is in the cache for sure. Batches in flight computed more,
      but may fail, and pages are registered only once they are complete.
    windows: of the groups.
    pool: of the pages.
  """
  num_groups = len(windows)
  for group, window in enumerate(windows):
    first = page_groups.first_place(window, num_tokens, pool.page_size)
    behind = range(
      seq.num_behind[group] * num_groups + group, first * num_groups, num_groups
    )
    if behind:
      pool.give_back([seq.pages[i] for i in behind])
      for i in behind:
        seq.pages[i] = NOWHERE
      seq.num_behind[group] = first


def find(
  num_places: int,
  windows: page_groups.Windows,
  page_size: int,
  page_of: Callable[[int, int], int | None],
) -> list[int]:
  """Returns the pages of the longest beginning of which all that is needed is.

  A group without a window needs all pages, others those of the last window
  before the end.

  Args:
    num_places: the most places of the beginning.
    windows: of the groups.
    page_size: tokens in a page.
    page_of: returns the page of a place and a group, if there is one.
  """
  found: list[list[int | None]] = []  # of each group, its pages
  runs: list[list[int]] = []  # of each, the pages in a row up to each place
  for group, window in enumerate(windows):
    pages: list[int | None] = []
    lengths = [0]
    for place in range(num_places):
      page = page_of(place, group)
      if page is None and window is None:
        num_places = place
        break
      pages.append(page)
      lengths.append(0 if page is None else lengths[-1] + 1)
    found.append(pages)
    runs.append(lengths)
  for num in range(num_places, 0, -1):
    first = [
      page_groups.first_place(w, num * page_size, page_size) for w in windows
    ]
    if all(run[num] >= num - at for run, at in zip(runs, first, strict=True)):
      return [
        page if page is not None and place >= at else NOWHERE
        for place in range(num)
        for page, at in zip(
          (pages[place] for pages in found), first, strict=True
        )
      ]
  return []
