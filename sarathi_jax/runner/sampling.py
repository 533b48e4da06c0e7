# SPDX-License-Identifier: Apache-2.0
"""Samples tokens on the device.

The random numbers of a token are those of `fold_in(fold_in(key, seed),
position)`. The high half of the seed's 64 bits makes the key, and the low half
is folded in. So a request's tokens depend on its seed alone, and not on its
batch, chunks, preemptions or parallelism.

Filters are applied in vLLM's order: temperature, min-p, top-k, top-p. Tokens
as likely as the last that a filter keeps are kept, too. Thresholds are found
by bisecting the bits of a float, in 32 passes over the logits, instead of by
sorting them.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

from sarathi_jax.runner import batch

_NEVER = -jnp.inf


def _sortable(x: Float[Array, 'S V']) -> UInt[Array, 'S V']:
  """Returns floats as unsigned integers of the same order."""
  x = jnp.where(x == 0, 0, x)  # -0.0 is no less than 0.0.
  bits = lax.bitcast_convert_type(x, jnp.uint32)
  sign = jnp.uint32(0x80000000)
  return jnp.where(bits >= sign, ~bits, bits | sign)


def _largest_threshold(
  keys: UInt[Array, 'S V'],
  enough: Callable[[Bool[Array, 'S V']], Bool[Array, ' S']],
) -> Bool[Array, 'S V']:
  """Selects the fewest largest keys of each row that are `enough`.

  Keeps all ties.
  """

  def set_bit(i: Array, threshold: Array) -> Array:
    candidate = threshold | (jnp.uint32(0x80000000) >> i.astype(jnp.uint32))
    keep = enough(keys >= candidate[:, None])
    return jnp.where(keep, candidate, threshold)

  zeros = jnp.zeros(keys.shape[0], jnp.uint32)
  return keys >= lax.fori_loop(0, 32, set_bit, zeros)[:, None]


def filter_logits(
  logits: Float[Array, 'S V'],
  top_k: Int[Array, ' S'],
  top_p: Float[Array, ' S'],
  min_p: Float[Array, ' S'],
) -> Float[Array, 'S V']:
  """Sets the logits of tokens that must not be sampled to minus infinity.

  Args:
    logits: float32, divided by the temperature.
    top_k: how many of the likeliest tokens to keep; 0 for all.
    top_p: keep the likeliest tokens that make up this probability.
    min_p: keep tokens at least this fraction as likely as the likeliest.
  """
  relative = logits - logits.max(axis=-1, keepdims=True)
  logits = jnp.where(relative >= jnp.log(min_p)[:, None], logits, _NEVER)
  keys = _sortable(logits)
  k = jnp.where(top_k > 0, top_k, logits.shape[-1])
  kept = _largest_threshold(keys, lambda m: m.sum(-1, dtype=jnp.int32) >= k)
  logits = jnp.where(kept, logits, _NEVER)
  probs = jax.nn.softmax(logits, axis=-1)
  top_p = jnp.maximum(top_p, jnp.finfo(jnp.float32).tiny)  # Keeps one token.
  kept = _largest_threshold(
    keys, lambda m: jnp.where(m, probs, 0).sum(-1) >= top_p
  )
  return jnp.where(kept | (top_p >= 1)[:, None], logits, _NEVER)


def _argmax(x: Float[Array, 'S V']) -> Int[Array, ' S']:
  """Returns jnp.argmax, whose loop over pairs XLA doesn't vectorize on CPUs."""
  index = jnp.arange(x.shape[-1], dtype=jnp.int32)[None, :]
  is_top = x == x.max(axis=-1, keepdims=True)
  return jnp.where(is_top, index, x.shape[-1] - 1).min(axis=-1)


def sample(
  logits: Float[Array, 'S V'],
  temperature: Float[Array, ' S'],
  top_k: Int[Array, ' S'],
  top_p: Float[Array, ' S'],
  min_p: Float[Array, ' S'],
  seeds: Int[Array, 'S 2'],
  positions: Int[Array, ' S'],
) -> batch.StepOutput:
  """Samples one token a row.

  Does no work that no row of the batch asks for.

  Args:
    logits: float32.
    temperature: 0 for the likeliest token.
    top_k, top_p, min_p: see `filter_logits`.
    seeds: of the requests, see `batch.BatchArrays`.
    positions: of the sampled tokens in their sequences.

  Returns:
    Token ids (int32) and their log-probabilities (float32) under `logits` as
    given, before temperature and filters. These are finite, or NaN where logits
    are NaN, infinite, or all minus infinity; such a row's token is void.
  """
  greedy = _argmax(logits)

  def draw() -> Array:
    # With 0 as the largest, a low temperature makes no logit infinite.
    scaled = logits - logits.max(axis=-1, keepdims=True)
    scaled = scaled / jnp.where(temperature > 0, temperature, 1)[:, None]
    is_filtered = (top_k > 0) | (top_p < 1) | (min_p > 0)
    scaled = lax.cond(
      is_filtered.any(),
      lambda x: filter_logits(x, top_k, top_p, min_p),
      lambda x: x,
      scaled,
    )

    def noise(seed: Array, position: Array) -> Array:
      # The program's default generator may depend on the batch.
      low, high = seed.astype(jnp.uint32)
      key = jax.random.wrap_key_data(
        jnp.stack([jnp.uint32(0), high]), impl='threefry2x32'
      )
      key = jax.random.fold_in(jax.random.fold_in(key, low), position)
      return jax.random.gumbel(key, logits.shape[-1:], jnp.float32)

    drawn = _argmax(scaled + jax.vmap(noise)(seeds, positions))
    return jnp.where(temperature > 0, drawn, greedy)

  tokens = lax.cond((temperature > 0).any(), draw, lambda: greedy)
  chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
  total = jax.nn.logsumexp(logits, axis=-1)  # Finite if the logits are sane.
  logprobs = jnp.maximum(chosen - total, jnp.finfo(jnp.float32).min)
  return batch.StepOutput(
    tokens, jnp.where(jnp.isfinite(total), logprobs, jnp.nan)
  )
