# SPDX-License-Identifier: Apache-2.0
"""Converts codes of 4 bits in kernels for GPUs, two at a time.

As `pallas_kernels.unpacking` does for bytes. Results are exact.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import unpacking
from pallas_kernels.quantized_matmul import operand


class _E2m1(NamedTuple):
  """How a number of E2M1 is moved to a half of 16 bits.

  Attributes:
    shift: how far its exponent and mantissa are to be shifted up.
    factor: what that number is to be multiplied by, as its exponent has another
      bias.
  """

  shift: int
  factor: int


_E2M1 = {'bfloat16': _E2m1(6, 0x7E80), 'float16': _E2m1(9, 0x7400)}
_SIGN_SHIFT = 12  # of a code's highest bit to a half's


def unpack(
  values: jax.Array,
  high: bool,
  codes: str,
  zero: jax.Array | None,
  dtype: jax.typing.DTypeLike,
  *,
  more: jax.Array | None = None,
  interpret: bool,
  once: jax.Array,
) -> jax.Array:
  """Returns what one of the two codes in each byte stands for.

  Args:
    values: [bytes, columns] uint8, of a size that 4 divides.
    high: whether it is the one of the high half.
    codes: int4 or mxfp4.
    zero: [columns] int32, the codes of 0; None: they are `more`, or 8.
    dtype: of the result: bfloat16, float16 or float32.
    more: [bytes, columns] uint8, of each byte; None: there is no more. Of int4
      the codes of 0; of mxfp4 what stands for powers of two, by which numbers
      are multiplied in bfloat16.
    interpret, once: see `unpacking.unpack`.
  """
  half = unpacking.HALVES.get(jnp.dtype(dtype).name)
  if interpret or half is None:
    found = (values.astype(jnp.int32) >> (4 * high)) & 15
    if codes == 'mxfp4':
      numbers = operand.e2m1(found, dtype)
      return numbers if more is None else numbers * operand.powers(more)
    of_zero: Any = operand.INT4_ZERO
    if zero is not None:
      of_zero = zero[None]
    elif more is not None:
      of_zero = more.astype(jnp.int32)
    return (found - of_zero).astype(dtype)
  args: tuple[jax.Array, ...] = (values,)
  if more is not None:
    args = (values, more)
  elif codes == 'int4' and zero is not None:
    # As a code is before its zero is taken away.
    above = (zero + (1 << jnp.finfo(dtype).nmant)).astype(dtype)
    args = (values, jnp.broadcast_to(above[None], values.shape))
  size = args[1].dtype.itemsize if len(args) > 1 else None
  ptx = assembly(codes, jnp.dtype(dtype).name, high, size)
  return unpacking.call(ptx, args, dtype, once)


def assembly(codes: str, dtype: str, high: bool, more: int | None) -> str:
  """Returns PTX that converts half of the four bytes of $2 to $0 and $1.

  Args:
    codes, dtype, high: see `unpack`.
    more: the bytes of what else a code has. With 1, $3 has four: of int4 zeros,
      of mxfp4 scales. With 2, $3 and $4 have halves: those of which one step is
      1, plus int4's zeros.
  """
  half = unpacking.HALVES[dtype]
  if codes == 'int4':
    lines = _int4(half, high, more)
  else:
    lines = (
      *_e2m1(half, _E2M1[dtype], 0, high, more is not None),
      *_e2m1(half, _E2M1[dtype], 1, high, more is not None),
    )
  return '\n'.join(('{', '.reg .b32 v, w, x, y, z;', *lines, '}'))


def _int4(
  half: unpacking.Half, high: bool, more: int | None
) -> tuple[str, ...]:
  """Converts four codes: each is the lower byte of a half, of which one step is
  1, and whose upper byte is always the same."""
  upper = half.one_a_step >> 8
  zero = unpacking.twice(half.one_a_step + operand.INT4_ZERO)
  return (
    f'mov.b32 z, {unpacking.twice(upper << 8 | upper)};',
    f'mov.b32 y, {unpacking.twice(half.minus_one)};',
    f'shr.u32 x, $2, {4 * high};',
    'and.b32 x, x, 0xf0f0f0f;',
    *(
      line
      for pair, bytes_of in enumerate((0x4140, 0x4342))
      for line in (
        f'prmt.b32 w, x, z, {bytes_of:#x};',
        {
          None: f'mov.b32 v, {zero};',
          1: f'prmt.b32 v, $3, z, {bytes_of:#x};',
          2: f'mov.b32 v, ${3 + pair};',
        }[more],
        f'fma.rn.{half.name} ${pair}, v, y, w;',
      )
    ),
  )


def _e2m1(
  half: unpacking.Half, moved: _E2m1, pair: int, high: bool, has_scale: bool
) -> tuple[str, ...]:
  """Converts two codes, seem, whose bits are moved to a half's.

  Ampere multiplies halves of bfloat16 by `fma` alone; -0 changes nothing.
  """
  less = 4 * high
  scaled = (  # Of 0 it is 2**-127, which has no leading bit.
    f'prmt.b32 x, $3, 0, {(0x1404, 0x3424)[pair]:#x};',
    'shr.u32 x, x, 1;',
    f'mov.b32 y, {unpacking.twice(1 << 6)};',
    f'max.{half.name} x, x, y;',
    f'fma.rn.{half.name} ${pair}, w, x, z;',
  )
  return (
    f'prmt.b32 x, $2, 0, {(0x4140, 0x4342)[pair]:#x};',
    f'shl.b32 y, x, {_SIGN_SHIFT - less};',
    'and.b32 y, y, 0x80008000;',
    f'shl.b32 x, x, {moved.shift - less};',
    f'lop3.b32 x, x, {unpacking.twice(7 << moved.shift)}, y, 0xea;',
    f'mov.b32 y, {unpacking.twice(moved.factor)};',
    'mov.b32 z, 0x80008000;',
    f'fma.rn.{half.name} {"w" if has_scale else f"${pair}"}, x, y, z;',
    *(scaled if has_scale else ()),
  )
