# SPDX-License-Identifier: Apache-2.0
"""The definition: a loop over tokens in NumPy. Not to be jitted."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.ragged_paged_attention import layout
from pallas_kernels.ragged_paged_attention import quantization


def rotate_and_write(
  q: Any,
  k: Any,
  v: Any,
  rotation: Any,
  k_pages: quantization.Pages,
  v_pages: quantization.Pages,
  slot_mapping: Any,
  norms: Any = None,
  rows: Any = None,
) -> Any:
  """Rotates and writes; see `api.rotate_and_write`."""
  q_norm, k_norm = norms or (None, None)
  kind = layout.of(k_pages)
  num_pages, _, page_size, _ = layout.sizes(k_pages)
  both = layout.to_rows(k_pages, v_pages)
  kept = [jax.tree.map(np.array, pages) for pages in both]
  for token, slot in enumerate(np.asarray(slot_mapping).tolist()):
    if not 0 <= slot < num_pages * page_size:
      continue
    place = slot // page_size, slice(None), slot % page_size
    for pages, new in zip(
      kept,
      (_turned(k[token], rotation, token, k_norm), v[token]),
      strict=True,
    ):
      if isinstance(pages, quantization.Quantized):
        rounded = quantization.quantize_like(jnp.asarray(new), pages)
        for array, x in zip(pages, rounded, strict=True):
          array[place] = x
      else:
        pages[place] = np.asarray(new).astype(pages.dtype)
  which = range(len(q)) if rows is None else np.asarray(rows).tolist()
  turned = [
    _turned(heads, rotation, token, q_norm)
    for heads, token in zip(q, which, strict=True)
  ]
  return (
    jnp.stack(turned) if turned else q,
    layout.from_rows(kind, *jax.tree.map(jnp.asarray, tuple(kept))),
  )


def _turned(heads: Any, rotation: Any, token: int, norm: Any) -> jax.Array:
  """Returns a token's heads, [heads, h], normalized, and then rotated."""
  x = np.array(heads, np.float32)
  if norm is not None:
    factors = norm.offset + np.asarray(norm.weight, np.float32)
    mean_square = np.mean(np.square(x), axis=-1, keepdims=True)
    x = x / np.sqrt(mean_square + np.float32(norm.eps)) * factors
    x = x.astype(heads.dtype).astype(np.float32)
  if rotation is not None:
    cos, sin = (np.asarray(table[token]) for table in rotation)
    half = len(cos)
    left, right = x[:, :half].copy(), x[:, half : 2 * half].copy()
    x[:, :half] = left * cos - right * sin
    x[:, half : 2 * half] = right * cos + left * sin
  return jnp.asarray(x).astype(heads.dtype)
