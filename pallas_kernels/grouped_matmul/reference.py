# SPDX-License-Identifier: Apache-2.0
"""The definition: each row by itself, with a copy of its group's matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def grouped_matmul(
  x: jax.Array,
  matrices: tuple[Any, ...],
  group_sizes: jax.Array,
  rows: jax.Array,
  combine: Callable[..., jax.Array],
  matmul: Callable[[jax.Array, Any], jax.Array],
  biases: tuple[jax.Array, ...] = (),
) -> jax.Array:
  """Multiplies each row by its group's matrix; see `api.grouped_matmul`."""
  ends = jnp.cumsum(group_sizes)
  places = jnp.arange(rows.shape[0])
  group = jnp.searchsorted(ends, places, side='right')

  def one(row: jax.Array, group: jax.Array) -> jax.Array:
    of_group, added = jax.tree.map(lambda leaf: leaf[group], (matrices, biases))
    products = [matmul(row[None], w)[0] for w in of_group]
    if added:
      products = [p + b for p, b in zip(products, added, strict=True)]
    out: jax.Array = combine(*products)
    return out

  out = jax.vmap(one)(x[rows], jnp.minimum(group, len(group_sizes) - 1))
  return jnp.where((places < ends[-1])[:, None], out, 0).astype(x.dtype)
