# SPDX-License-Identifier: Apache-2.0
"""Converts kept bytes in kernels for GPUs, in two or three instructions each.

By itself, Triton makes up to ten: it converts a byte at a time, on Ampere int8
at an eighth of the rate of arithmetic. These take two at a time, in the halves
of a register, and all of them are in every GPU from Ampere on. Results are
exact, those of `decode`.

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


class Half(NamedTuple):
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
  'bfloat16': Half('bf16x2', 0x4300, 0xBF80, 4, 0x07F0, 0x7B80),
  'float16': Half('f16x2', 0x6400, 0xBC00, 1, 0x3F80, 0x5C00),
}


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


def unpack(
  values: jax.Array,
  dtype: jax.typing.DTypeLike,
  *,
  interpret: bool,
  once: jax.Array | None = None,
) -> jax.Array:
  """Does what `decode` does, within a kernel of Pallas' Triton.

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
    return decode(values, dtype)
  return call(assembly(values.dtype, half), (values,), dtype, once)


def call(
  ptx: str,
  args: tuple[jax.Array, ...],
  dtype: jax.typing.DTypeLike,
  once: jax.Array | None,
) -> jax.Array:
  """Runs PTX on four bytes at a time, in a kernel.

  Args:
    ptx: of which $0 and $1 are four halves, $2 the bytes, and $3 and $4 what
      else there is of each, in halves.
    args: bytes, and what else there is, of their shape.
    dtype: of the halves.
    once: see `unpack`.
  """

  registers = sum(arg.dtype.itemsize for arg in args)  # of four numbers each

  def convert(*args: jax.Array) -> jax.Array:
    (result,) = plgpu.elementwise_inline_asm(
      ptx,
      args=args,
      constraints=','.join(['=r'] * 2 + ['r'] * registers),
      pack=4,
      result_shape_dtypes=[jax.ShapeDtypeStruct(args[0].shape, dtype)],
    )
    return result

  if once is None:
    return convert(*args)
  return lax.cond(once, convert, convert, *args)


def assembly(kept: jnp.dtype, half: Half) -> str:
  """Returns PTX that converts the four bytes of $2 to halves in $0 and $1."""
  convert = _int8 if kept == jnp.int8 else _fp8
  return '\n'.join(
    ('{', '.reg .b32 x, y, z;', *convert(half, 0), *convert(half, 1), '}')
  )


def _int8(half: Half, pair: int) -> tuple[str, ...]:
  """Converts two bytes, each a number below 128, less 128 if it is negative.

  Such a number is the lowest bits of a half of which one step is 1, and so is
  what is to be taken away. (lop3 with 0xea is a & b | c.)
  """
  return (
    f'prmt.b32 x, $2, 0, {(0x4140, 0x4342)[pair]:#x};',
    f'mov.b32 z, {twice(half.one_a_step)};',
    'lop3.b32 y, x, 0x800080, z, 0xea;',
    'lop3.b32 x, x, 0x7f007f, z, 0xea;',
    f'mov.b32 z, {twice(half.minus_one)};',
    f'fma.rn.{half.name} ${pair}, y, z, x;',
  )


def _fp8(half: Half, pair: int) -> tuple[str, ...]:
  """Converts two bytes, seee emmm, whose bits are moved to a half's.

  -0 is added, which changes nothing, not even -0.
  """
  return (
    f'prmt.b32 x, $2, 0, {(0x1404, 0x3424)[pair]:#x};',
    'and.b32 y, x, 0x80008000;',
    f'shr.u32 x, x, {half.shift};',
    f'lop3.b32 x, x, {twice(half.mask)}, y, 0xea;',
    f'mov.b32 y, {twice(half.factor)};',
    'mov.b32 z, 0x80008000;',
    f'fma.rn.{half.name} ${pair}, x, y, z;',
  )


def twice(bits: int) -> str:
  """Returns 16 bits in both halves of a register, as PTX writes it."""
  return f'{bits << 16 | bits:#x}'
