# SPDX-License-Identifier: Apache-2.0
"""Turns by plain arithmetic, and writes by XLA's scatter: for any device."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.ragged_paged_attention import layout
from pallas_kernels.ragged_paged_attention import quantization
from pallas_kernels.rotate_and_write import head_norm

Rotation = tuple[jax.Array, jax.Array]


def turn(
  x: jax.Array, rotation: Rotation | None, norm: head_norm.HeadNorm | None
) -> jax.Array:
  """Normalizes each head, and then rotates it.

  Args:
    x: [T, heads, h], any float.
    rotation: (cos, sin) of each token, [T, half] float32 each: pairs
      (i, i + half) are rotated, and what is beyond 2 * half is left; None: all.
    norm: None: heads are left as they are.

  Returns:
    [T, heads, h] of x's dtype, to which it is rounded after either.
  """
  if norm is not None:
    x = _normalize(x, norm)
  return x if rotation is None else _rotate(x, rotation)


def _normalize(x: jax.Array, norm: head_norm.HeadNorm) -> jax.Array:
  x32 = x.astype(jnp.float32)
  square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
  weight = norm.weight.astype(jnp.float32)[None, None]
  if norm.offset:
    weight = norm.offset + weight
  return (x32 * jax.lax.rsqrt(square + norm.eps) * weight).astype(x.dtype)


def _rotate(x: jax.Array, rotation: Rotation) -> jax.Array:
  cos, sin = (table[:, None, :] for table in rotation)
  half = cos.shape[-1]
  x32 = x.astype(jnp.float32)
  left, right, rest = jnp.split(x32, (half, 2 * half), axis=-1)
  turned = jnp.stack(
    [left * cos - right * sin, right * cos + left * sin], axis=-2
  )
  turned = turned.reshape(*x.shape[:-1], 2 * half)
  return jnp.concatenate([turned, rest], axis=-1).astype(x.dtype)


def rotate_and_write(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  rotation: Rotation | None,
  k_pages: quantization.Pages,
  v_pages: quantization.Pages,
  slot_mapping: jax.Array,
  norms: head_norm.HeadNorms | None = None,
  rows: jax.Array | None = None,
) -> tuple[jax.Array, tuple[quantization.Pages, quantization.Pages]]:
  """Rotates and writes; see `api.rotate_and_write`."""
  of_queries = rotation
  if rotation is not None and rows is not None:
    cos, sin = rotation
    of_queries = cos[rows], sin[rows]
  q_norm, k_norm = norms or (None, None)
  q = turn(q, of_queries, q_norm)
  k = turn(k, rotation, k_norm)
  return q, layout.write(k_pages, v_pages, k, v, slot_mapping)
