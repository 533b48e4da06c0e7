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
whole caches on CPUs. `decode` converts it with integer operations that every
device has.
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


class Quantized(NamedTuple):
  """Numbers of one byte; number = decode(value) * scale.

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
  _, largest = _KEPT[dtype]
  scales = jnp.maximum(jnp.abs(x).max(-1) / largest, _TINY)
  # Division may round up to beyond the largest, which fp8 would make NaN.
  scaled = jnp.clip(x / scales[..., None], -largest, largest)
  if dtype == INT8:
    return Quantized(jnp.round(scaled).astype(INT8), scales)
  return Quantized(
    lax.bitcast_convert_type(scaled.astype(FP8), jnp.uint8), scales
  )


def quantize_like(x: jax.Array, pages: Quantized) -> Quantized:
  """Quantizes x, [..., h], to the dtype that pages are kept in."""
  dtype = next(
    d for d, (kept, _) in _KEPT.items() if kept == pages.values.dtype
  )
  return quantize(x, dtype)


def decode(values: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
  """Converts kept bytes to their numbers, exactly; converts floats, too.

  Args:
    values: int8, uint8 for the bits of float8_e4m3fn, or any float.
    dtype: float32, bfloat16 or float16.
  """
  if values.dtype != jnp.uint8:
    return values.astype(dtype)
  # seee emmm -> s0ee eemm m000 0000, a float16 of 2**-8 times the number: its
  # exponent has a bit more, and a bias of 15 where e4m3 has 7.
  bits = values.astype(jnp.uint16)
  bits = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
  halves = lax.bitcast_convert_type(bits, jnp.float16)
  return (halves.astype(jnp.float32) * 256).astype(dtype)
