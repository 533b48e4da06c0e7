# SPDX-License-Identifier: Apache-2.0
"""Pallas, lowered to Triton: NVIDIA GPUs from Ampere on. One launch.

A block of the GPU takes a row. It reads the row once, and keeps in registers a
*sketch*: the logits dealt to columns, in turn, and of each column the largest
few. Logits above all that was left out are in the sketch, every one of them. A
vocabulary of 32,768 is so as a whole, and of a larger one most rows' filters
keep nothing else. There the thresholds are found without reading anything
again. Of other rows, where thousands are kept, they are found by reading the
row again, a pass for each three bits.

A threshold is found digit by digit of a float's bits, as an integer that
ascends with the float: what the logits from it on weigh, each 1 for top-k, or
its probability for top-p, is compared with what is asked for.

On CPUs it runs in Pallas's interpreter, for tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import functools
import itertools
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
import jax.numpy as jnp
import numpy as np

from pallas_kernels import devices
from pallas_kernels.filter_threshold import tuning

_NEVER = -np.inf
_TINY = float(np.finfo(np.float32).tiny)
_LOWEST = -(2**31)
# What the infinities are as integers; beyond come NaNs.
_KEY_OF_NEVER, _KEY_OF_INFINITY = -0x7F800001, 0x7F800000
_BITS = 32
_SKETCH_DIGIT, _MEMORY_DIGIT = 2, 3  # bits

Vectors = Sequence[jax.Array]
# Sums up what logits from each of some numbers on weigh.
Sums = Callable[[Callable[[jax.Array], jax.Array], Vectors], Vectors]


def least_kept(
  logits: jax.Array,
  top_k: jax.Array,
  top_p: jax.Array,
  *,
  sizes: tuning.Sizes | None = None,
) -> jax.Array:
  """Finds the least logits that are kept; see `api.least_kept`.

  Args:
    logits, top_k, top_p: see there.
    sizes: None for those that `tuning` has for the default device.

  Raises:
    NotImplementedError: the kernel can't run there.
  """
  sizes = (sizes or tuning.choose()).for_vocab(logits.shape[1])
  launch = functools.partial(_launch, sizes=sizes)
  return devices.launch(launch, logits, top_k, top_p)


def _launch(
  logits: jax.Array,
  top_k: jax.Array,
  top_p: jax.Array,
  *,
  sizes: tuning.Sizes,
  interpret: bool,
) -> jax.Array:
  num_rows, vocab_size = logits.shape
  return pl.pallas_call(
    functools.partial(_kernel, vocab_size=vocab_size, sizes=sizes),
    grid=(num_rows,),
    out_shape=jax.ShapeDtypeStruct((num_rows,), jnp.float32),
    compiler_params=plgpu.CompilerParams(
      num_warps=sizes.num_warps, num_stages=1
    ),
    interpret=interpret,
    name='least_kept',
  )(logits, top_k, top_p)


def _kernel(
  logits_ref: Any,
  top_k_ref: Any,
  top_p_ref: Any,
  least_ref: Any,
  *,
  vocab_size: int,
  sizes: tuning.Sizes,
) -> None:
  """Finds the least logit that one row keeps.

  Args:
    logits_ref: [S, V] float32.
    top_k_ref: [S] int32.
    top_p_ref: [S] float32.
    least_ref: [S] float32, the result.
    vocab_size: V.
    sizes: of what a block holds.
  """
  row = pl.program_id(0)
  top_k, top_p = top_k_ref[row], top_p_ref[row]
  is_asked = (top_k > 0) | (top_p < 1)

  def load(i: jax.Array) -> list[jax.Array]:
    """Loads some tiles, all before the first of them is waited for."""
    at = [
      (i * sizes.num_tiles + j) * sizes.tile
      + jnp.arange(sizes.tile, dtype=jnp.int32)
      for j in range(sizes.num_tiles)
    ]
    return [
      plgpu.load(logits_ref.at[row, x], mask=x < vocab_size, other=_NEVER)
      for x in at
    ]

  num_loads = -(-vocab_size // (sizes.tile * sizes.num_tiles))

  def store(sums: Sums, mass: jax.Array, digit: int) -> None:
    least_ref[row] = _find(sums, mass, top_k, top_p, digit)

  @pl.when(is_asked)
  def find() -> None:
    levels, left_out, mass = _sketch(load, num_loads, sizes)
    tops = [functools.reduce(jnp.maximum, level).max() for level in levels]
    in_sketch = functools.partial(_sums_of, levels, tops)
    in_memory = functools.partial(_sums_in_memory, load, num_loads, sizes.tile)
    if vocab_size <= sizes.num_logits:
      store(in_sketch, mass, _SKETCH_DIGIT)
      return
    suffices = (left_out == _NEVER) | lax.select(
      top_k > 0,
      _above(levels, left_out, _one) >= top_k.astype(jnp.float32),
      _above(levels, left_out, jnp.exp) >= top_p * mass,
    )
    pl.when(suffices)(functools.partial(store, in_sketch, mass, _SKETCH_DIGIT))
    pl.when(~suffices)(functools.partial(store, in_memory, mass, _MEMORY_DIGIT))

  @pl.when(~is_asked)
  def keep_all() -> None:
    least_ref[row] = _choose(is_asked, jnp.float32(0), jnp.float32(_NEVER))


def _choose(condition: jax.Array, x: Any, y: Any) -> jax.Array:
  """Returns jnp.where of scalars, of which Pallas takes no plain numbers."""
  return lax.select(condition, x, y)


def _one(x: jax.Array) -> jax.Array:
  return jnp.ones_like(x)


def _sketch(
  load: Callable[[jax.Array], list[jax.Array]],
  num_loads: int,
  sizes: tuning.Sizes,
) -> tuple[list[Vectors], jax.Array, jax.Array]:
  """Reads a row once.

  Returns:
    For each level the columns' logits, the largest first, in vectors; the
    largest that is in no level; and the sum of the exponentials of all.
  """

  def put(i: jax.Array, state: Any) -> Any:
    columns, left_out, mass = state
    dealt = []
    for levels, x in zip(columns, load(i), strict=True):
      mass += jnp.exp(x)
      sunk, put_in = x, []
      for level in levels:
        put_in.append(jnp.maximum(level, sunk))
        sunk = jnp.minimum(level, sunk)
      dealt.append(put_in)
      left_out = jnp.maximum(left_out, sunk)
    return dealt, left_out, mass

  never = jnp.full(sizes.tile, _NEVER, jnp.float32)
  columns, left_out, mass = lax.fori_loop(
    0,
    num_loads,
    put,
    (
      [[never] * sizes.levels for _ in range(sizes.num_tiles)],
      never,
      jnp.zeros(sizes.tile, jnp.float32),
    ),
  )
  return list(zip(*columns, strict=True)), left_out.max(), mass.sum()


def _above(
  levels: Sequence[Vectors],
  number: jax.Array,
  weigh: Callable[[jax.Array], jax.Array],
) -> jax.Array:
  """Returns what the logits of a sketch weigh that are above a number."""
  total = jnp.zeros_like(levels[0][0])
  for x in itertools.chain(*levels):
    total += jnp.where(x > number, weigh(x), 0)
  return total.sum()


def _sums_of(
  levels: Sequence[Vectors],
  tops: Vectors,
  weigh: Callable[[jax.Array], jax.Array],
  numbers: Vectors,
) -> list[jax.Array]:
  """Sums up weights within a sketch, of logits from each number on.

  Args:
    levels: of the sketch.
    tops: the largest logit of each.
    weigh: see `_weights`.
    numbers: ascending; logits that are less than all have no weight.
  """

  def add(level: Vectors, sums: list[jax.Array]) -> list[jax.Array]:
    for x in level:  # One after the other, which takes the fewest registers.
      sums = _add(sums, _weights(x, weigh, numbers))
    return sums

  sums = [jnp.zeros_like(levels[0][0]) for _ in numbers]
  for level, top in zip(levels, tops, strict=True):
    # Of lower levels, most filters keep nothing.
    sums = lax.cond(
      top >= numbers[0], functools.partial(add, level), list, sums
    )
  return [x.sum() for x in sums]


def _sums_in_memory(
  load: Callable[[jax.Array], list[jax.Array]],
  num_loads: int,
  tile: int,
  weigh: Callable[[jax.Array], jax.Array],
  numbers: Vectors,
) -> list[jax.Array]:
  """Sums up weights in one pass over a row, of logits from each number on."""

  def add(i: jax.Array, sums: Any) -> Any:
    for x in load(i):
      sums = _add(sums, _weights(x, weigh, numbers))
    return sums

  zeros = [jnp.zeros(tile, jnp.float32) for _ in numbers]
  return [x.sum() for x in lax.fori_loop(0, num_loads, add, zeros)]


def _add(sums: Vectors, more: Vectors) -> list[jax.Array]:
  return [a + b for a, b in zip(sums, more, strict=True)]


def _weights(
  x: jax.Array, weigh: Callable[[jax.Array], jax.Array], numbers: Vectors
) -> list[jax.Array]:
  """Weighs what is at least each of some ascending numbers; 0 what is less."""
  # What is less than all is left out before, so that no compiler takes the
  # weights out of the loop over digits, for which there are no registers.
  weights = weigh(jnp.where(x >= numbers[0], x, _NEVER))
  return [jnp.where(x >= number, weights, 0) for number in numbers]


def _find(
  sums: Sums, mass: jax.Array, top_k: jax.Array, top_p: jax.Array, digit: int
) -> jax.Array:
  """Finds the least logit that is kept.

  Args:
    sums: right for numbers that are kept; for less, not less than these.
    mass: what all logits weigh for top_p.
    top_k, top_p: of the row.
    digit: bits that are found in a pass.
  """
  of_k = _largest_number(
    functools.partial(sums, _one),
    top_k.astype(jnp.float32),
    digit,
    top_k > 0,
    jnp.float32(_NEVER),
  )
  masses = functools.partial(sums, jnp.exp)
  mass = jnp.where(top_k > 0, masses([of_k])[0], mass)
  target = jnp.maximum(top_p * mass, _TINY)  # Keeps one token.
  return _largest_number(masses, target, digit, top_p < 1, of_k)


def _largest_number(
  sums: Callable[[Vectors], Vectors],
  target: jax.Array,
  digit: int,
  is_asked: jax.Array,
  at_least: jax.Array,
) -> jax.Array:
  """Finds the largest number of which logits from it on weigh enough.

  Args:
    sums: what logits from some numbers on weigh.
    target: how much is enough.
    digit: bits that are found in a pass.
    is_asked: whether to make any pass.
    at_least: the result if it is not asked, or if all do not weigh enough. What
      is less is not asked of `sums`.
  """
  num_digits = -(-_BITS // digit)

  def add_digit(i: jax.Array, key: jax.Array) -> jax.Array:
    shift = digit * (num_digits - 1 - i)
    keys = [key + (jnp.int32(j) << shift) for j in range(1, 1 << digit)]
    weights = sums([jnp.maximum(_float(key), at_least) for key in keys])
    best = key
    for candidate, weight in zip(keys, weights, strict=True):
      # Of the first digit, there may be fewer values: others overflow.
      is_enough = (candidate > key) & (weight >= target)
      best = jnp.where(is_enough, candidate, best)
    return best

  found = lax.fori_loop(
    jnp.int32(0),
    _choose(is_asked, jnp.int32(num_digits), jnp.int32(0)),
    add_digit,
    jnp.int32(_LOWEST),
  )
  return jnp.maximum(_float(found), at_least)


def _float(key: jax.Array) -> jax.Array:
  """Returns the float of an integer that ascends with it, no NaN."""
  key = jnp.clip(key, _KEY_OF_NEVER, _KEY_OF_INFINITY)
  bits = key ^ ((key >> 31) & jnp.int32(0x7FFFFFFF))
  return lax.bitcast_convert_type(bits, jnp.float32)
