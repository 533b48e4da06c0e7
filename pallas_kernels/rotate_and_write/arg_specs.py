# SPDX-License-Identifier: Apache-2.0
"""Batches as data, for tests and the compiler."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.ragged_paged_attention import layout
from pallas_kernels.rotate_and_write import head_norm


@dataclasses.dataclass(frozen=True, slots=True)
class ArgSpec:
  """A batch, of which `make` draws the arguments of the operation.

  Attributes:
    num_heads, num_kv_heads, head_dim: H, K, h.
    half: pairs of a head that are rotated; None: no rotation.
    norms: whether heads are normalized.
    offset: of the norms.
    dtype: of queries, keys and values.
    kv_dtype: of pages, as for `init_pages`; None: `dtype`.
    num_tokens: T.
    num_rows: R, where queries are of some tokens only; None: of all.
    num_pages, page_size: of the pool.
  """

  num_heads: int = 4
  num_kv_heads: int = 2
  head_dim: int = 16
  half: int | None = 8
  norms: bool = False
  offset: int = 0
  dtype: str = 'float32'
  kv_dtype: str | None = None
  num_tokens: int = 9
  num_rows: int | None = None
  num_pages: int = 6
  page_size: int = 8


# What tests compare, by what is special of it.
TESTS: Mapping[str, ArgSpec] = {
  'plain': ArgSpec(),
  'partial': ArgSpec(head_dim=80, half=16),
  'pieces': ArgSpec(head_dim=80, half=40),
  'no rotation': ArgSpec(half=None),
  'some rows': ArgSpec(num_rows=3),
  'norms': ArgSpec(norms=True),
  'norms alone': ArgSpec(norms=True, half=None),
  'norms from one': ArgSpec(norms=True, offset=1),
  'norms of pieces, some rows': ArgSpec(
    norms=True, head_dim=80, half=16, num_rows=3
  ),
  'norms of bfloat16, int8': ArgSpec(
    norms=True, head_dim=128, half=64, dtype='bfloat16', kv_dtype='int8'
  ),
  'more rows than tokens': ArgSpec(num_tokens=2, num_rows=5),
  '71 heads': ArgSpec(num_heads=71, num_kv_heads=1, head_dim=64, half=32),
  '7 of 3': ArgSpec(num_heads=21, num_kv_heads=3),
  'a query for a key': ArgSpec(num_heads=12, num_kv_heads=12, page_size=4),
  '256 channels': ArgSpec(head_dim=256, half=128),
  'bfloat16': ArgSpec(dtype='bfloat16'),
  'float16': ArgSpec(dtype='float16'),
  'kept in float32': ArgSpec(dtype='bfloat16', kv_dtype='float32'),
  'kept in float16': ArgSpec(dtype='bfloat16', kv_dtype='float16'),
  'int8': ArgSpec(kv_dtype='int8'),
  'fp8': ArgSpec(kv_dtype='float8_e4m3fn'),
  'int8 of bfloat16, pieces': ArgSpec(
    dtype='bfloat16', kv_dtype='int8', head_dim=80, half=16
  ),
  'fp8 of bfloat16, pieces': ArgSpec(
    dtype='bfloat16', kv_dtype='float8_e4m3fn', head_dim=96, half=48
  ),
}


def make(spec: ArgSpec, seed: int = 0) -> dict[str, Any]:
  """Draws the arguments of `api.rotate_and_write`, by name.

  Pages are rows, of numbers that must stay where nothing is written. Slots have
  the pool's first and last, and what lies just beside it; what belongs to none
  is NaN, as is all that no query needs.
  """
  rng = np.random.default_rng(seed)
  num_slots = spec.num_pages * spec.page_size
  beside = [-1, num_slots, 2**31 - 1, -(2**31)][: spec.num_tokens // 2]
  inside = rng.permutation(np.arange(1, num_slots - 1))
  slots = np.concatenate([beside, [0, num_slots - 1], inside])
  slots = rng.permutation(slots[: spec.num_tokens]).astype(np.int32)
  is_padding = (slots < 0) | (slots >= num_slots)
  rows = None
  if spec.num_rows is not None:
    real = np.flatnonzero(~is_padding)
    rows = rng.choice(real, spec.num_rows).astype(np.int32)

  def heads(num_rows: int, num_heads: int, unused: Any = ()) -> jax.Array:
    x = 3 * rng.standard_normal((num_rows, num_heads, spec.head_dim))
    x[unused] = np.nan
    return jnp.asarray(x, spec.dtype)

  angles = rng.uniform(0, 7, (spec.num_tokens, spec.half or 0))
  tables = [jnp.asarray(f(angles), jnp.float32) for f in (np.cos, np.sin)]
  k_pages, v_pages = jax.tree.map(
    lambda x: jnp.asarray(rng.uniform(1, 100, x.shape).astype(x.dtype)),
    layout.init(
      layout.ROWS,
      spec.num_pages,
      spec.page_size,
      spec.num_kv_heads,
      spec.head_dim,
      spec.kv_dtype or spec.dtype,
    ),
  )
  norms = [
    head_norm.HeadNorm(jnp.asarray(weight, spec.dtype), 1e-5, spec.offset)
    for weight in rng.uniform(0.5, 2, (2, spec.head_dim))
  ]
  num_rows = spec.num_tokens if rows is None else len(rows)
  return {
    'q': heads(num_rows, spec.num_heads),
    'k': heads(spec.num_tokens, spec.num_kv_heads, is_padding),
    'v': heads(spec.num_tokens, spec.num_kv_heads, is_padding),
    'rotation': None if spec.half is None else tuple(tables),
    'k_pages': k_pages,
    'v_pages': v_pages,
    'slot_mapping': jnp.asarray(slots),
    'norms': tuple(norms) if spec.norms else None,
    'rows': None if rows is None else jnp.asarray(rows),
  }
