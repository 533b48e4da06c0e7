# SPDX-License-Identifier: Apache-2.0
"""In plain XLA: each threshold by bisecting the bits of a float.

That is 32 passes over the logits for each filter that a row asks for, instead
of sorting them.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax import lax
import jax.numpy as jnp

from pallas_kernels import ordered_bits

_NEVER = -jnp.inf
_TOP_BIT = 0x80000000


def least_kept(
  logits: jax.Array, top_k: jax.Array, top_p: jax.Array
) -> jax.Array:
  """Finds the least logits that are kept; see `api.least_kept`."""
  keys = ordered_bits.of(logits)
  of_k = _largest_threshold(
    keys, top_k > 0, lambda kept: kept.sum(-1, dtype=jnp.int32) >= top_k
  )
  probs = jax.nn.softmax(
    jnp.where(keys >= of_k[:, None], logits, _NEVER), axis=-1
  )
  top_p = jnp.maximum(top_p, jnp.finfo(jnp.float32).tiny)  # Keeps one token.
  of_p = _largest_threshold(
    keys, top_p < 1, lambda kept: jnp.where(kept, probs, 0).sum(-1) >= top_p
  )
  key = jnp.maximum(of_k, of_p)
  return jnp.where(key == 0, _NEVER, ordered_bits.to_float(key))


def _largest_threshold(
  keys: jax.Array,
  is_asked: jax.Array,
  enough: Callable[[jax.Array], jax.Array],
) -> jax.Array:
  """Finds the largest threshold of which the keys from it on are `enough`.

  Returns 0 for rows that do not ask, or of which all keys are not enough. If
  no row asks, it makes no pass over the keys.

  Args:
    keys: [S, V] uint32.
    is_asked: [S].
    enough: takes which keys are kept, [S, V]; returns whether they are, [S].
  """

  def set_bit(i: jax.Array, threshold: jax.Array) -> jax.Array:
    bit = jnp.uint32(_TOP_BIT) >> lax.convert_element_type(i, jnp.uint32)
    candidate = threshold | bit
    keep = enough(keys >= candidate[:, None])
    return jnp.where(keep, candidate, threshold)

  zeros = jnp.zeros(keys.shape[0], jnp.uint32)
  num_bits = jnp.where(is_asked.any(), 32, 0)
  threshold = lax.fori_loop(0, num_bits, set_bit, zeros)
  return jnp.where(is_asked, threshold, 0)
