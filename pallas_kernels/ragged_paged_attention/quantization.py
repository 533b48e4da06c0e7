# SPDX-License-Identifier: Apache-2.0
"""Keys and values of one byte each, with a scale for every token and head.

A scale is made when a token is written, from its own numbers alone, so nothing
has to be calibrated, and what was written is never touched again. One scale
for a whole page would not allow that: a later token with larger numbers would
force all the others to be rounded anew. vLLM has the same as
`int8_per_token_head` and `fp8_per_token_head`, beside scales of whole tensors
that checkpoints bring. For a head dim of 128, scales add one thirty-second.

int8 is the more accurate of the two, wherever a head's largest number is not
many times its usual one. fp8 is float8_e4m3fn. Its bits are kept as uint8, as
vLLM and FlashInfer do: GPUs before Ada can't convert it, and XLA would convert
whole caches on CPUs. `unpacking.decode` converts it with integer operations
that every device has.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import jax
from jax import lax
import jax.numpy as jnp

INT8, FP8 = jnp.dtype(jnp.int8), jnp.dtype(jnp.float8_e4m3fn)
# The dtype a number is rounded to -> the dtype it is kept in, the largest.
_KEPT = {INT8: (INT8, 127.0), FP8: (jnp.dtype(jnp.uint8), 448.0)}
DTYPES = tuple(_KEPT)
SCALE_DTYPE = jnp.dtype(jnp.float32)
KEPT_DTYPES = tuple(kept for kept, _ in _KEPT.values())
_TINY = 1e-30  # The scale where all numbers are 0: 0 / 0 would be NaN.
_LEAST_NORMAL = 121 << 23  # the bits of 2**-6, the least of float8_e4m3fn


class Quantized(NamedTuple):
  """Numbers of one byte; number = unpacking.decode(value) * scale.

  Attributes:
    values: [..., h] int8, or uint8 for the bits of float8_e4m3fn. Where h is
      depends on the pages' layout.
    scales: float32, shaped as the rows were but for h.
  """

  values: jax.Array
  scales: jax.Array


Pages: TypeAlias = jax.Array | Quantized


def values_of(pages: Pages) -> jax.Array:
  """Returns the array of keys or values, quantized or not."""
  return pages.values if isinstance(pages, Quantized) else pages


def kept_dtype(dtype: jax.typing.DTypeLike) -> jnp.dtype:
  """Returns the dtype of the array that numbers of `dtype` are kept in."""
  dtype = jnp.dtype(dtype)
  return _KEPT[dtype][0] if dtype in _KEPT else dtype


def quantize(x: jax.Array, dtype: jax.typing.DTypeLike) -> Quantized:
  """Rounds each row of the last axis by a scale of its own.

  Args:
    x: [..., h], any float.
    dtype: int8 or float8_e4m3fn.

  Returns:
    Values as they are kept, [..., h], and float32 scales, [...].

  Raises:
    ValueError: another dtype.
  """
  dtype = jnp.dtype(dtype)
  if dtype not in _KEPT:
    raise ValueError(
      f'dtype={dtype}: must be one of {", ".join(d.name for d in _KEPT)}.'
    )
  x = x.astype(jnp.float32)
  kept, largest = _KEPT[dtype]
  scales = scales_of(jnp.abs(x).max(-1), kept)
  # Division may round up to beyond the largest, which fp8 would make NaN.
  scaled = jnp.clip(x / scales[..., None], -largest, largest)
  if dtype == INT8:
    return Quantized(jnp.round(scaled).astype(INT8), scales)
  return Quantized(
    lax.bitcast_convert_type(scaled.astype(FP8), jnp.uint8), scales
  )


def scales_of(peaks: jax.Array, kept: jax.typing.DTypeLike) -> jax.Array:
  """Returns scales, by each row's largest absolute number, float32.

  Args:
    peaks: float32.
    kept: the dtype of what is kept: int8, or uint8 for float8_e4m3fn.
  """
  return jnp.maximum(peaks / _largest(kept), _TINY)


def encode(x: jax.Array, kept: jax.typing.DTypeLike) -> jax.Array:
  """Rounds numbers to bytes, as `quantize` does, within a GPU's kernel.

  There is no rounding to even in Triton, nor float8_e4m3fn before Ada; so both
  are made of operations that every device has.

  Args:
    x: float32, numbers divided by their scale.
    kept: see `scales_of`.

  Returns:
    Bytes of the dtype `kept`.
  """
  largest = _largest(kept)
  x = jnp.clip(x, -largest, largest)
  if jnp.dtype(kept) == INT8:
    return _nearest(x).astype(INT8)
  bits = lax.bitcast_convert_type(x, jnp.int32)
  sign, bits = (bits >> 24) & 0x80, bits & 0x7FFFFFFF
  # Of 23 bits of a mantissa three are left, and a bias of 7 of 127: a carry
  # goes into the exponent, as it should. Numbers below 2**-6 are multiples of
  # 2**-9.
  normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
  small = _nearest(jnp.abs(x) * 512)
  return (jnp.where(bits < _LEAST_NORMAL, small, normal) | sign).astype(
    jnp.uint8
  )


def _nearest(x: jax.Array) -> jax.Array:
  """Rounds small float32 to int32, halves to even."""
  whole = x.astype(jnp.int32)
  rest = jnp.abs(x - whole.astype(jnp.float32))  # exact
  is_up = (rest > 0.5) | ((rest == 0.5) & ((whole & 1) == 1))
  away = is_up.astype(jnp.int32)
  return jnp.where(x < 0, whole - away, whole + away)


def _largest(kept: jax.typing.DTypeLike) -> float:
  return next(most for dtype, most in _KEPT.values() if dtype == kept)


def quantize_like(x: jax.Array, pages: Quantized) -> Quantized:
  """Quantizes x, [..., h], to the dtype that pages are kept in."""
  dtype = next(
    d for d, (kept, _) in _KEPT.items() if kept == pages.values.dtype
  )
  return quantize(x, dtype)
