# SPDX-License-Identifier: Apache-2.0
"""How a page lays out its keys and values, and how new ones get there.

rows:   keys and values [N, K, page_size, h].
tiles:  keys   [N, K, page_size / l, h, l], l positions side by side;
        values [N, K, h / l, page_size, l], l channels side by side.
        l is 8, a vector of float32 as XLA uses them, or less where it must
        divide the axis.

Tiles are for XLA on CPUs. What one vector of l scores, or of l outputs, needs
is contiguous in memory in the order in which it is needed, and never has to
be summed across the lanes of a vector. The number of axes tells which is
which.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

ROWS, TILES = 'rows', 'tiles'
_LANES = 8  # 16 and more: a third slower, the factors spill


def init(
  layout: str,
  num_pages: int,
  page_size: int,
  num_kv_heads: int,
  head_dim: int,
  dtype: jax.typing.DTypeLike,
) -> tuple[jax.Array, jax.Array]:
  """Zeroed keys and values."""
  shapes: list[tuple[int, ...]] = [(page_size, head_dim)] * 2
  if layout == TILES:
    l_k, l_v = math.gcd(page_size, _LANES), math.gcd(head_dim, _LANES)
    shapes = [(page_size // l_k, head_dim, l_k),
              (head_dim // l_v, page_size, l_v)]
  k_pages, v_pages = (
    jnp.zeros((num_pages, num_kv_heads, *shape), dtype) for shape in shapes)
  return k_pages, v_pages


def sizes(k_pages: jax.Array) -> tuple[int, int, int, int]:
  """(num_pages, num_kv_heads, page_size, head_dim) of either layout."""
  if k_pages.ndim == 4:
    num_pages, num_kv_heads, page_size, head_dim = k_pages.shape
    return num_pages, num_kv_heads, page_size, head_dim
  num_pages, num_kv_heads, tiles, head_dim, lanes = k_pages.shape
  return num_pages, num_kv_heads, tiles * lanes, head_dim


def to_rows(
  k_pages: jax.Array,
  v_pages: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """The same pages as rows: a copy, or themselves."""
  if k_pages.ndim == 4:
    return k_pages, v_pages
  shape = sizes(k_pages)
  return (k_pages.swapaxes(-1, -2).reshape(shape),
          v_pages.swapaxes(-2, -3).reshape(shape))


def from_rows(
  layout: str,
  k_pages: jax.Array,
  v_pages: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Rows in another layout: a copy, or themselves."""
  if layout == ROWS:
    return k_pages, v_pages
  num_pages, num_kv_heads, page_size, head_dim = k_pages.shape
  l_k, l_v = math.gcd(page_size, _LANES), math.gcd(head_dim, _LANES)
  k_tiles = k_pages.reshape(num_pages, num_kv_heads, -1, l_k, head_dim)
  v_tiles = v_pages.reshape(num_pages, num_kv_heads, page_size, -1, l_v)
  return k_tiles.swapaxes(-1, -2), v_tiles.swapaxes(-2, -3)


def write(
  k_pages: jax.Array,
  v_pages: jax.Array,
  k: jax.Array,  # [T, K, h]
  v: jax.Array,  # [T, K, h]
  slots: jax.Array,  # [T]
) -> tuple[jax.Array, jax.Array]:
  """See `api.write_kv`."""
  num_pages, num_kv_heads, page_size, head_dim = sizes(k_pages)
  # A negative index would count from the end.
  slots = jnp.where(slots < 0, num_pages * page_size, slots)
  page, offset = slots // page_size, slots % page_size
  k, v = k.astype(k_pages.dtype), v.astype(v_pages.dtype)
  if k_pages.ndim == 4:
    return (_put(k_pages.at[page, :, offset], k),
            _put(v_pages.at[page, :, offset], v))
  l_k, l_v = k_pages.shape[-1], v_pages.shape[-1]
  v = v.reshape(-1, num_kv_heads, head_dim // l_v, l_v)
  return (_put(k_pages.at[page, :, offset // l_k, :, offset % l_k], k),
          _put(v_pages.at[page, :, :, offset], v))


def _put(where: Any, new: jax.Array) -> jax.Array:
  return where.set(new, mode='drop', unique_indices=True)
