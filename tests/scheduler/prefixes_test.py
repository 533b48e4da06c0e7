# SPDX-License-Identifier: Apache-2.0
"""Keys of pages: alike exactly where all up to the page's end is."""

from __future__ import annotations

import array
import itertools

from hypothesis import given
from hypothesis import strategies as st

from sarathi_jax.scheduler import prefixes

TOKENS = st.lists(st.integers(0, 2), min_size=12, max_size=12)


def keys_of(
  tokens: list[int], page_size: int = 3, num_pages: int | None = None, **extras
) -> list[bytes]:
  keys: list[bytes] = []
  contents: list[bytes] = []
  num_pages = len(tokens) // page_size if num_pages is None else num_pages
  prefixes.extend(
    keys, contents, prefixes.root(**extras), tokens, num_pages, page_size
  )
  assert [t for page in contents for t in array.array('i', page)] == (
    tokens[: num_pages * page_size]
  )
  return keys


@given(TOKENS, TOKENS)
def test_keys_are_alike_where_all_tokens_up_to_the_page_are(one, two) -> None:
  keys = zip(keys_of(one), keys_of(two), strict=True)
  for page, (a, b) in enumerate(keys, 1):
    assert (a == b) == (one[: 3 * page] == two[: 3 * page])


@given(TOKENS, st.integers(0, 4))
def test_keys_do_not_depend_on_when_they_were_made(tokens, first) -> None:
  keys = keys_of(tokens, num_pages=first)
  assert len(keys) == first
  prefixes.extend(keys, [], prefixes.root(), tokens, 4, 3)
  assert keys == keys_of(tokens)


def test_pages_of_the_same_tokens_elsewhere_have_other_keys() -> None:
  assert len({*keys_of([7] * 12)}) == 4


def test_no_two_extras_are_alike() -> None:
  extras: list[dict[str, str | int]] = [
    {},
    {'salt': ''},
    {'salt': 'ab'},
    {'salt': 'a', 'adapter': 'b'},
    {'salt': 'b', 'adapter': 'a'},
    {'adapter': 'ab'},
    {'salt': '1'},
    {'salt': 1},
    {'salt': '\ud800'},
    {'sal': 'tab'},
  ]
  for one, two in itertools.combinations(extras, 2):
    assert not {*keys_of([1] * 6, **one)} & {*keys_of([1] * 6, **two)}


def test_every_process_makes_the_same_keys() -> None:
  """Or routers could not compare replicas."""
  (key,) = keys_of([1, 2, 3])
  assert key.hex() == (
    '7e63ecc554373a048277e0da9e0de9fe24574492255046cfa0fb827855bc733d'
  )
