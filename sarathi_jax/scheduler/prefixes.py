# SPDX-License-Identifier: Apache-2.0
"""Keys of full pages: what a page of the KV cache holds, and all before it.

A page's key is the sha256 of the key of the page before it, and of its own
tokens. The first one's is made from a root, which says what else the keys and
values depend on. So two pages of the same key hold the same, as far as anybody
can find out; and every process gives a page the same key, so that routers can
compare what replicas hold.
"""

from __future__ import annotations

import array
from collections.abc import Sequence
import functools
import hashlib


@functools.lru_cache(1024)
def root(**extras: str | int) -> bytes:
  """Returns the key before the first page.

  Args:
    extras: what else the cache depends on, by name. Each has its name and its
      length in the key, so that no two sets of them are alike.
  """
  digest = hashlib.sha256(b'sarathi_jax')
  for name, value in sorted(extras.items()):
    for part in (name, type(value).__name__, str(value)):
      data = part.encode('utf-8', 'surrogatepass')
      digest.update(len(data).to_bytes(8, 'little') + data)
  return digest.digest()


def pack(tokens: Sequence[int]) -> bytes:
  """Returns tokens as int32."""
  return array.array('i', tokens).tobytes()


def key_of(parent: bytes, tokens: bytes) -> bytes:
  """Returns the key of a page.

  Args:
    parent: the key of the page before it, or the root.
    tokens: its tokens, or those that it has so far; int32.
  """
  return hashlib.sha256(parent + tokens).digest()


def key_in(key: bytes, group: int) -> bytes:
  """Returns the key of a place's page of a group; the first one's is `key`."""
  return key + bytes([group]) if group else key


def extend(
  keys: list[bytes],
  contents: list[bytes],
  root_key: bytes,
  tokens: Sequence[int],
  num_pages: int,
  page_size: int,
) -> None:
  """Adds keys of a sequence's pages until there are `num_pages` of them.

  Args:
    keys: of its first pages.
    contents: the tokens of each of these pages, int32.
    root_key: see `root`.
    tokens: of the whole sequence, at least of all these pages.
    num_pages: of which to have keys.
    page_size: tokens of a page.
  """
  start = len(keys) * page_size
  stop = num_pages * page_size
  assert stop <= len(tokens), (stop, len(tokens))
  packed = pack(tokens[start:stop])
  key = keys[-1] if keys else root_key
  step = len(packed) // max(1, num_pages - len(keys))
  for at in range(0, len(packed), step or 1):
    page = packed[at : at + step]
    key = key_of(key, page)
    keys.append(key)
    contents.append(page)
