# SPDX-License-Identifier: Apache-2.0
"""The pages that begin as a sequence goes on, against looking at all."""

from __future__ import annotations

import random

from sarathi_jax.scheduler import beginnings as beginnings_lib
from sarathi_jax.scheduler import prefixes


def test_the_longest_is_found_among_what_was_not_removed() -> None:
  rng = random.Random(0)
  pages = beginnings_lib.Beginnings()
  held: dict[bytes, tuple[bytes, list[int]]] = {}
  num_found = 0
  for _ in range(20_000):
    parent = bytes([rng.randrange(3)])
    tokens = [rng.randrange(2) for _ in range(rng.randint(1, 6))]
    if rng.random() < 0.6:
      key = prefixes.key_of(parent, prefixes.pack(tokens))
      if key not in held:
        pages.add(key, parent, prefixes.pack(tokens))
        held[key] = parent, tokens
    while len(held) > rng.randint(2, 9):
      gone = rng.choice([*held])
      pages.remove(gone)
      del held[gone]
    found = pages.find(parent, prefixes.pack(tokens))
    if found is None:
      continue
    parent_of, there = held[found.key]
    alike = [a == b for a, b in zip(there, tokens, strict=False)] + [False]
    assert parent_of == parent and found.num_tokens == alike.index(False)
    num_found += 1
  assert num_found > 10_000
  for key in held:
    pages.remove(key)
  assert not (pages._pages or pages._latest or pages._older)


def test_of_those_that_came_last_all_are_compared() -> None:
  pages = beginnings_lib.Beginnings()
  for i in range(8):
    pages.add(bytes([i]), b'', prefixes.pack([1] * (8 - i)))
  assert pages.find(b'', prefixes.pack([1] * 9)) == (b'\0', 8)
  pages.add(b'new', b'', prefixes.pack([1]))
  assert pages.find(b'', prefixes.pack([1] * 9)) == (b'\1', 7)
  assert pages.find(b'other', prefixes.pack([1])) is None
