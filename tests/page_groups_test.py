# SPDX-License-Identifier: Apache-2.0
"""Counts of pages, against sequences that are computed token by token."""

from __future__ import annotations

import hypothesis
from hypothesis import strategies as st
import pytest

from sarathi_jax import page_groups

WINDOWS = st.lists(st.none() | st.integers(1, 40), min_size=1, max_size=3)


def most_held(
  windows: page_groups.Windows, num_tokens: int, page_size: int, chunk: int
) -> int:
  """The most pages of a sequence in chunks that begin wherever they may."""
  most = 0
  for start in range(num_tokens):
    stop = min(start + chunk, num_tokens)
    held = 0
    for window in windows:
      first = 0 if window is None else max(0, start - window + 1)
      held += len({p // page_size for p in range(first, stop)})
    most = max(most, held)
  return most


@hypothesis.given(
  windows=WINDOWS,
  num_tokens=st.integers(1, 70),
  page_size=st.integers(1, 20),
  chunk=st.integers(1, 80),
)
def test_as_many_pages_as_are_held_at_once(
  windows: list[int | None], num_tokens: int, page_size: int, chunk: int
) -> None:
  found = page_groups.num_pages(tuple(windows), num_tokens, page_size, chunk)
  least = most_held(tuple(windows), num_tokens, page_size, chunk)
  # The most urgent begin of a window may lie beyond a short sequence's end.
  assert least <= found <= least + len(windows)


def test_the_example() -> None:
  assert page_groups.num_pages((None, 20), 100, 8) == 13 + 4
  assert page_groups.num_pages((None, 20), 8, 8) == 1 + 1
  assert page_groups.num_pages((None, 20), 100, 8, chunk=100) == 13 + 13


@hypothesis.given(
  windows=WINDOWS, num_tokens=st.integers(0, 90), page_size=st.integers(1, 20)
)
def test_what_is_needed_yet_is_kept(
  windows: list[int | None], num_tokens: int, page_size: int
) -> None:
  for window in windows:
    first = page_groups.first_place(window, num_tokens, page_size)
    oldest = 0 if window is None else max(0, num_tokens - window + 1)
    assert first * page_size <= oldest < (first + 1) * page_size


@pytest.mark.parametrize('pages', [0, 1, 4, 5, 17, 30])
def test_the_longest_is_the_longest(pages: int) -> None:
  windows, page_size = (None, 20), 8
  longest = page_groups.longest(windows, pages, page_size, 200)
  fits = [
    n
    for n in range(1, 201)
    if page_groups.num_pages(windows, n, page_size) <= pages
  ]
  assert longest == max(fits, default=0)
  assert page_groups.longest((None,), pages, page_size, 200) == min(
    pages * page_size, 200
  )


def test_tokens_of_a_cache() -> None:
  assert page_groups.num_tokens((None,), 10, 8, 33) == 80
  each = page_groups.num_pages((None, 20), 100, 8)
  assert page_groups.num_tokens((None, 20), 3 * each, 8, 100) == 300
