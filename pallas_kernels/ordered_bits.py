# SPDX-License-Identifier: Apache-2.0
"""Floats as integers of the same order."""

from __future__ import annotations

import jax
from jax import lax
import jax.numpy as jnp

_SIGN = 0x80000000


def of(x: jax.Array) -> jax.Array:
  """Returns float32 as uint32 of the same order, none of them 0."""
  x = jnp.where(x == 0, 0, x)  # -0.0 is no less than 0.0.
  bits = lax.bitcast_convert_type(x, jnp.uint32)
  sign = jnp.uint32(_SIGN)
  return jnp.where(bits >= sign, ~bits, bits | sign)


def to_float(keys: jax.Array) -> jax.Array:
  """Returns what `of` was given."""
  sign = jnp.uint32(_SIGN)
  bits = jnp.where(keys >= sign, keys ^ sign, ~keys)
  return lax.bitcast_convert_type(bits, jnp.float32)
