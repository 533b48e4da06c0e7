# SPDX-License-Identifier: Apache-2.0
"""Adds and normalizes by plain arithmetic: for any device."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def add_and_norm(
  x: jax.Array, out: jax.Array, weight: jax.Array, eps: float, offset: int = 0
) -> tuple[jax.Array, jax.Array]:
  """Adds and normalizes; see `api.add_and_norm`."""
  total = x + out
  wide = total.astype(jnp.float32)
  square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
  factors = weight.astype(jnp.float32)[None]
  if offset:
    factors = offset + factors
  normed = wide * jax.lax.rsqrt(square + eps) * factors
  return total, normed.astype(x.dtype)
