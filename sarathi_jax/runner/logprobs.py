# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of several tokens at a position, on the device.

The likeliest tokens are found without sorting: those of the groups of columns
with the largest maxima, which are found in the same way. As many groups as
tokens suffice: each has one at least as likely as all that is left out. Of
equal tokens, the lower id comes first.
"""

from __future__ import annotations

from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import ordered_bits
from sarathi_jax.runner import told

_GROUP = 128  # columns


def tell(
  logits: Float[Array, 'S V'],
  tokens: Int[Array, ' S'],
  named: Int[Array, 'S N'],
) -> told.ToldArrays:
  """Tells of the tokens that are there, the likeliest ones, and named ones.

  Args:
    logits: float32; of any scale, as only differences count.
    tokens: that are there.
    named: other token ids.
  """
  logits = logits - logits.max(axis=-1, keepdims=True)  # Large ones are coarse.
  total = jnp.log(jnp.exp(logits).sum(axis=-1, keepdims=True))

  def of(ids: Int[Array, 'S n']) -> Float[Array, 'S n']:
    return jnp.take_along_axis(logits, ids, axis=-1, mode='clip')

  mine = of(tokens[:, None])
  ids = _likeliest(logits)
  return told.ToldArrays(
    ranks=(logits >= mine).sum(-1, dtype=jnp.int32),
    logprobs=(mine - total)[:, 0],
    top_ids=ids,
    top_logprobs=of(ids) - total,
    named=of(named) - total,
  )


def zeros(num: int, num_named: int) -> told.ToldArrays:
  """Returns what `tell` does of so many positions, without any content."""
  return told.ToldArrays(
    ranks=jnp.zeros(num, jnp.int32),
    logprobs=jnp.zeros(num, jnp.float32),
    top_ids=jnp.zeros((num, told.NUM_TOP), jnp.int32),
    top_logprobs=jnp.zeros((num, told.NUM_TOP), jnp.float32),
    named=jnp.zeros((num, num_named), jnp.float32),
  )


def _likeliest(logits: Float[Array, 'S V']) -> Int[Array, 'S K']:
  """Returns the ids of the largest logits; beyond V where there are fewer."""
  num_rows, vocab_size = logits.shape
  num_groups = -(-vocab_size // _GROUP)
  widths = [(0, 0), (0, num_groups * _GROUP - vocab_size)]
  groups = jnp.pad(logits, widths, constant_values=-jnp.inf).reshape(
    num_rows, num_groups, _GROUP
  )
  chosen = jnp.arange(num_groups, dtype=jnp.int32)[None, :]
  if num_groups > told.NUM_TOP:
    chosen = jnp.sort(_largest(groups.max(-1)), axis=-1)
    groups = jnp.take_along_axis(groups, chosen[:, :, None], axis=1)
  found = _largest(groups.reshape(num_rows, -1))
  group = jnp.take_along_axis(
    jnp.broadcast_to(chosen, (num_rows, chosen.shape[1])),
    found // _GROUP,
    axis=1,
  )
  return group * _GROUP + found % _GROUP


def _largest(x: Float[Array, 'S n']) -> Int[Array, 'S K']:
  """Returns the places of the largest, the largest first, all different."""
  return lax.platform_dependent(  # type: ignore[no-any-return]
    jnp.where(x == 0, 0, x),  # -0.0 is no less than 0.0.
    cpu=lambda x: lax.top_k(x, told.NUM_TOP)[1],
    default=_largest_by_passes,
  )


def _largest_by_passes(x: Float[Array, 'S n']) -> Int[Array, 'S K']:
  """Returns `_largest`, where sorting would take a graph of its own."""
  places = jnp.arange(x.shape[1], dtype=jnp.int32)[None, :]

  def take(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
    keys, found = carry
    place = argmax(keys)
    return (
      jnp.where(places == place[:, None], 0, keys),  # less than any other's
      found.at[:, i].set(place),
    )

  found = jnp.zeros((len(x), told.NUM_TOP), jnp.int32)
  return lax.fori_loop(0, told.NUM_TOP, take, (ordered_bits.of(x), found))[1]


def argmax(x: Array) -> Int[Array, ' S']:
  """Returns jnp.argmax, whose loop over pairs XLA doesn't vectorize on CPUs."""
  index = jnp.arange(x.shape[-1], dtype=jnp.int32)[None, :]
  is_top = x == x.max(axis=-1, keepdims=True)
  return jnp.where(is_top, index, x.shape[-1] - 1).min(axis=-1)
