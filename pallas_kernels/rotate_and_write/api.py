# SPDX-License-Identifier: Apache-2.0
"""The function to call: what a layer does between projections and attention.

Shape letters: T tokens of the batch, R rows of queries, H query heads, K
key-value heads, h head dim, N pages in the pool.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.ragged_paged_attention import layout
from pallas_kernels.ragged_paged_attention import quantization
from pallas_kernels.ragged_paged_attention import validate
from pallas_kernels.rotate_and_write import head_norm
from pallas_kernels.rotate_and_write import pallas_triton
from pallas_kernels.rotate_and_write import reference
from pallas_kernels.rotate_and_write import tuning
from pallas_kernels.rotate_and_write import xla

Pages = quantization.Pages
Rotation = tuple[jax.Array, jax.Array]

IMPLEMENTATIONS: Mapping[str, Callable[..., Any]] = {
  'reference': reference.rotate_and_write,
  'xla': xla.rotate_and_write,
  'pallas_triton': pallas_triton.rotate_and_write,
}


def rotate_and_write(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  rotation: Rotation | None,
  k_pages: Pages,
  v_pages: Pages,
  slot_mapping: jax.Array,
  *,
  norms: head_norm.HeadNorms | None = None,
  rows: jax.Array | None = None,
  implementation: str | None = None,
) -> tuple[jax.Array, tuple[Pages, Pages]]:
  """Turns queries and keys, and writes keys and values to their pages.

  Each head is normalized first, if there are `norms`. Then its pairs
  (i, i + half) are rotated by their token's angles, and what is beyond 2 * half
  is left as it is (partial rotation). Both are in float32, and what they give
  is rounded to q's dtype; keys and values once more to what pages are kept in.

  Worked example: half=1, cos=[[0]], sin=[[1]], a quarter turn; a query's head
  [1, 2, 3] becomes [-2, 1, 3].

  Args:
    q: [R, H, h], queries; any float.
    k: [T, K, h], new keys, of q's dtype.
    v: [T, K, h], new values, of q's dtype.
    rotation: (cos, sin) of each token, [T, half] float32 each; None for a model
      that rotates nothing.
    k_pages: of `ragged_paged_attention.init_pages`; updated in place where
      donated.
    v_pages: like k_pages.
    slot_mapping: int32 [T], page * page_size + offset of each token, all
      different; of those outside [0, N * page_size) nothing is written
      (padding).
    norms: of queries and of keys; None: there are none.
    rows: int32 [R], the tokens that the queries are of; None: R is T, and they
      are of all.
    implementation: a key of `IMPLEMENTATIONS`; None: the fastest here for such
      pages. `pallas_triton` takes one launch, and no copy of q, k and v where
      they are pieces of one array, side by side.

  Returns:
    The turned queries, [R, H, h] of q's dtype, and (k_pages, v_pages).

  Raises:
    ValueError: shapes or dtypes don't fit; says which and why.
    NotImplementedError: they do, but this implementation can't do it.
  """
  if implementation is None:
    implementation = tuning.fastest() if layout.is_rows(k_pages) else 'xla'
  check = validate.check
  check(
    implementation in IMPLEMENTATIONS,
    'implementation',
    implementation,
    f'must be None or one of {", ".join(IMPLEMENTATIONS)}',
  )
  validate.validate_written(k_pages, v_pages, k, v, slot_mapping)
  num_tokens, _, head_dim = k.shape
  num_rows = num_tokens if rows is None else len(rows)
  check(
    q.ndim == 3 and (len(q), q.shape[2]) == (num_rows, head_dim),
    'q',
    q.shape,
    f'must be [{num_rows}, heads, {head_dim}]',
  )
  for name, x in (('k', k), ('v', v)):
    check(
      x.dtype == q.dtype, name, x.dtype, f'must be the dtype of q, {q.dtype}'
    )
  if rows is not None:
    check(
      rows.ndim == 1 and rows.dtype == jnp.int32,
      'rows',
      f'{rows.dtype}{rows.shape}',
      'must be int32, with one axis',
    )
  tables: tuple[jax.Array, ...] = rotation or ()
  for table in tables:
    check(
      table.dtype == jnp.float32
      and table.shape == (num_tokens, tables[0].shape[-1])
      and 2 * table.shape[1] <= head_dim,
      'rotation',
      f'{table.dtype}{table.shape}',
      f'must be two of float32[{num_tokens}, at most {head_dim // 2}]',
    )
  for norm in norms or ():
    shape = norm.weight.shape
    check(shape == (head_dim,), 'norms', shape, f'must be ({head_dim},)')
  turned: tuple[jax.Array, tuple[Pages, Pages]] = IMPLEMENTATIONS[
    implementation
  ](q, k, v, rotation, k_pages, v_pages, slot_mapping, norms, rows)
  return turned
