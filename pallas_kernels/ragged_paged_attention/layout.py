# SPDX-License-Identifier: Apache-2.0
"""Lays out keys and values in pages, and writes new ones.

rows:   keys and values [N, K, page_size, h].
tiles:  keys   [N, K, page_size / l, h, l], l positions side by side;
        values [N, K, h / l, page_size, l], l channels side by side.
        l is 8, a vector of float32 as XLA uses them, or less where it must
        divide the axis.
lines:  tiles of 16, a line of a processor's cache: for a kernel of ours.
scales: of quantized ones, [N, K, page_size] in either layout.

Tiles are for XLA on CPUs. The numbers that a vector of l scores, or of l
outputs, needs are contiguous in memory, in the order in which it needs them,
and are never summed across the lanes of a vector. The number of axes tells the
layouts apart.
"""

from __future__ import annotations

from collections.abc import Callable
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.ragged_paged_attention import quantization

Pages = quantization.Pages
ROWS, TILES, LINES = 'rows', 'tiles', 'lines'
# Of XLA's, 16 and more are a third slower: the factors spill.
_LANES = {TILES: 8, LINES: 16}


def init(
  layout: str,
  num_pages: int,
  page_size: int,
  num_kv_heads: int,
  head_dim: int,
  dtype: jax.typing.DTypeLike,
) -> tuple[Pages, Pages]:
  """Returns zeroed keys and values; see `api.init_pages`."""
  shapes: list[tuple[int, ...]] = [(page_size, head_dim)] * 2
  if layout != ROWS:
    l_k, l_v = (math.gcd(n, _LANES[layout]) for n in (page_size, head_dim))
    shapes = [
      (page_size // l_k, head_dim, l_k),
      (head_dim // l_v, page_size, l_v),
    ]
  heads = num_pages, num_kv_heads
  k_pages, v_pages = (
    jnp.zeros((*heads, *shape), quantization.kept_dtype(dtype))
    for shape in shapes
  )
  if jnp.dtype(dtype) not in quantization.DTYPES:
    return k_pages, v_pages
  k_scales, v_scales = (
    jnp.zeros((*heads, page_size), quantization.SCALE_DTYPE) for _ in range(2)
  )
  return (
    quantization.Quantized(k_pages, k_scales),
    quantization.Quantized(v_pages, v_scales),
  )


def sizes(k_pages: Pages) -> tuple[int, int, int, int]:
  """Returns (num_pages, num_kv_heads, page_size, head_dim), of any layout."""
  shape = quantization.values_of(k_pages).shape
  if len(shape) == 4:
    num_pages, num_kv_heads, page_size, head_dim = shape
    return num_pages, num_kv_heads, page_size, head_dim
  num_pages, num_kv_heads, tiles, head_dim, lanes = shape
  return num_pages, num_kv_heads, tiles * lanes, head_dim


def of(pages: Pages) -> str:
  """Returns the name of the pages' layout."""
  values = quantization.values_of(pages)
  if values.ndim == 4:
    return ROWS
  return LINES if values.shape[-1] == _LANES[LINES] else TILES


def is_rows(pages: Pages) -> bool:
  """Says whether pages are laid out as rows, not as tiles."""
  return of(pages) == ROWS


def to_rows(k_pages: Pages, v_pages: Pages) -> tuple[Pages, Pages]:
  """Returns the pages as rows: a copy, or themselves."""
  if is_rows(k_pages):
    return k_pages, v_pages
  shape = sizes(k_pages)
  return (
    _of_values(lambda x: x.swapaxes(-1, -2).reshape(shape), k_pages),
    _of_values(lambda x: x.swapaxes(-2, -3).reshape(shape), v_pages),
  )


def from_rows(
  layout: str,
  k_pages: Pages,
  v_pages: Pages,
) -> tuple[Pages, Pages]:
  """Returns rows in another layout: a copy, or themselves."""
  if layout == ROWS:
    return k_pages, v_pages
  num_pages, num_kv_heads, page_size, head_dim = sizes(k_pages)
  l_k, l_v = (math.gcd(n, _LANES[layout]) for n in (page_size, head_dim))
  k_shape = num_pages, num_kv_heads, -1, l_k, head_dim
  v_shape = num_pages, num_kv_heads, page_size, -1, l_v
  return (
    _of_values(lambda x: x.reshape(k_shape).swapaxes(-1, -2), k_pages),
    _of_values(lambda x: x.reshape(v_shape).swapaxes(-2, -3), v_pages),
  )


def write(
  k_pages: Pages,
  v_pages: Pages,
  k: jax.Array,  # [T, K, h]
  v: jax.Array,  # [T, K, h]
  slots: jax.Array,  # [T]
) -> tuple[Pages, Pages]:
  """Writes new keys and values by XLA's scatter; see `api.write_kv`."""
  num_pages, _, page_size, _ = sizes(k_pages)
  # A negative index would count from the end.
  slots = jnp.where(slots < 0, num_pages * page_size, slots)
  place = slots // page_size, slots % page_size
  return (
    _write(k_pages, k, place, _put_keys),
    _write(v_pages, v, place, _put_values),
  )


_Place = tuple[jax.Array, jax.Array]  # page and offset of each token


def _write(
  pages: Pages, new: jax.Array, place: _Place, put: Callable[..., jax.Array]
) -> Pages:
  if not isinstance(pages, quantization.Quantized):
    return put(pages, new.astype(pages.dtype), place)
  rounded = quantization.quantize_like(new, pages)
  page, offset = place
  return quantization.Quantized(
    put(pages.values, rounded.values, place),
    _put(pages.scales.at[page, :, offset], rounded.scales),
  )


def _put_keys(pages: jax.Array, k: jax.Array, place: _Place) -> jax.Array:
  page, offset = place
  if is_rows(pages):
    return _put(pages.at[page, :, offset], k)
  lanes = pages.shape[-1]
  return _put(pages.at[page, :, offset // lanes, :, offset % lanes], k)


def _put_values(pages: jax.Array, v: jax.Array, place: _Place) -> jax.Array:
  page, offset = place
  if is_rows(pages):
    return _put(pages.at[page, :, offset], v)
  _, num_kv_heads, tiles, _, lanes = pages.shape
  return _put(
    pages.at[page, :, :, offset], v.reshape(-1, num_kv_heads, tiles, lanes)
  )


def _put(where: Any, new: jax.Array) -> jax.Array:
  return where.set(new, mode='drop', unique_indices=True)


def _of_values(
  function: Callable[[jax.Array], jax.Array], pages: Pages
) -> Pages:
  """Rearranges values, and not scales: these are the same in all layouts."""
  if isinstance(pages, quantization.Quantized):
    return pages._replace(values=function(pages.values))
  return function(pages)
