# SPDX-License-Identifier: Apache-2.0
"""Converts kept bytes in kernels for GPUs, in two or three instructions each.

By itself, Triton makes up to ten: it converts a byte at a time, on Ampere int8
at an eighth of the rate of arithmetic. These take two at a time, in the halves
of a register, and all of them are in every GPU from Ampere on. Results are
exact, those of `quantization.decode`.

By itself, Triton would also move them behind the copy, through shared memory,
that hands out what is multiplied: each warp would then convert all that it
multiplies by, which is what the others do where their rows differ. And it would
lay out what is multiplied as suits bytes, for which there is no ldmatrix. It
does neither across a branch. So where each byte is to be converted once, by the
thread that loads it, that is done in a branch, with the same in the other: LLVM
joins both after Triton is done, and no branch is left.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
from jax import lax
from jax.experimental.pallas import triton as plgpu
import jax.numpy as jnp

from pallas_kernels.ragged_paged_attention import quantization


class _Half(NamedTuple):
  """Facts of a float of 16 bits, as the kernels' constants.

  Attributes:
    name: PTX's, of two of them.
    one_a_step: the least number of which the next one is larger by 1.
    minus_one: -1.
    shift: how far an e4m3's exponent and mantissa, in the half's upper byte,
      are shifted down to its own.
    mask: their bits then.
    factor: what that number is to be multiplied by, as its exponent has another
      bias.
  """

  name: str
  one_a_step: int
  minus_one: int
  shift: int
  mask: int
  factor: int


HALVES = {
  'bfloat16': _Half('bf16x2', 0x4300, 0xBF80, 4, 0x07F0, 0x7B80),
  'float16': _Half('f16x2', 0x6400, 0xBC00, 1, 0x3F80, 0x5C00),
}


def unpack(
  values: jax.Array,
  dtype: jax.typing.DTypeLike,
  *,
  interpret: bool,
  once: jax.Array | None = None,
) -> jax.Array:
  """Returns `quantization.decode`, within a kernel of Pallas' Triton.

  Args:
    values: int8, uint8 for the bits of float8_e4m3fn, or any float; of a size
      that 4 divides.
    dtype: float32, bfloat16 or float16.
    interpret: whether Pallas interprets the kernel, as it does on CPUs.
    once: bool; with it, one thread alone converts each byte. Whether it is true
      does not matter, but it may be known only as the kernel runs, and may
      change in each turn of a loop, else LLVM makes two loops. None: each
      thread converts what it needs.
  """
  half = HALVES.get(jnp.dtype(dtype).name)
  if interpret or half is None or values.dtype.itemsize > 1:
    return quantization.decode(values, dtype)

  def convert(values: jax.Array) -> jax.Array:
    (result,) = plgpu.elementwise_inline_asm(
      assembly(values.dtype, half),
      args=[values],
      constraints='=r,=r,r',
      pack=4,
      result_shape_dtypes=[jax.ShapeDtypeStruct(values.shape, dtype)],
    )
    return result

  if once is None:
    return convert(values)
  return lax.cond(once, convert, convert, values)


def assembly(kept: jnp.dtype, half: _Half) -> str:
  """Returns PTX that converts the four bytes of $2 to halves in $0 and $1."""
  convert = _int8 if kept == jnp.int8 else _fp8
  return '\n'.join(
    ('{', '.reg .b32 x, y, z;', *convert(half, 0), *convert(half, 1), '}')
  )


def _int8(half: _Half, pair: int) -> tuple[str, ...]:
  """Converts two bytes, each a number below 128, less 128 if it is negative.

  Such a number is the lowest bits of a half of which one step is 1, and so is
  what is to be taken away. (lop3 with 0xea is a & b | c.)
  """
  return (
    f'prmt.b32 x, $2, 0, {(0x4140, 0x4342)[pair]:#x};',
    f'mov.b32 z, {_twice(half.one_a_step)};',
    'lop3.b32 y, x, 0x800080, z, 0xea;',
    'lop3.b32 x, x, 0x7f007f, z, 0xea;',
    f'mov.b32 z, {_twice(half.minus_one)};',
    f'fma.rn.{half.name} ${pair}, y, z, x;',
  )


def _fp8(half: _Half, pair: int) -> tuple[str, ...]:
  """Converts two bytes, seee emmm, whose bits are moved to a half's.

  -0 is added, which changes nothing, not even -0.
  """
  return (
    f'prmt.b32 x, $2, 0, {(0x1404, 0x3424)[pair]:#x};',
    'and.b32 y, x, 0x80008000;',
    f'shr.u32 x, x, {half.shift};',
    f'lop3.b32 x, x, {_twice(half.mask)}, y, 0xea;',
    f'mov.b32 y, {_twice(half.factor)};',
    'mov.b32 z, 0x80008000;',
    f'fma.rn.{half.name} ${pair}, x, y, z;',
  )


def _twice(bits: int) -> str:
  return f'{bits << 16 | bits:#x}'
