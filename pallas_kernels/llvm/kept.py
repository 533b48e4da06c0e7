# SPDX-License-Identifier: Apache-2.0
"""How panels keep their numbers, and how lines of them become float32.

What has 16 bits is widened exactly. Codes (`quantized_matmul.operand` says what
they stand for) become numbers exactly, and these are multiplied by what their
column has for their group of rows, rounded once. float16 has all numbers of
fp8 and E2M1 but for a power of two, which scales take over: the processor
widens it, denormal ones too, where XLA has it flush those of float32. What no
finite matrix has is not told apart: e4m3's NaN is read as 480, and MXFP4's
scales above 2 ** 113 as that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any

from llvmlite import ir

from pallas_kernels.llvm import COLUMNS
from pallas_kernels.llvm import emit

LINE = ir.VectorType(emit.F32, COLUMNS)
_I16, _HALF = ir.IntType(16), ir.HalfType()
_INT4_ZERO = 8  # the code of 0, where there are no zeros
_MANTISSA = 23  # bits of float32
_MOST_EXPONENT = 254  # of a finite float32
_FP8_POWER = 8  # of two: e4m3's numbers as float16's, of more exponents
_E2M1_POWER = 14


@dataclasses.dataclass(frozen=True, slots=True)
class Kept:
  """How panels keep their numbers.

  Attributes:
    number: LLVM's type of what a line has `COLUMNS` of.
    num_bytes: of one.
    numbers: writes how a line, and a line of codes of 0 if there are some,
      become a line of float32 for each of its rows.
    rows: of the matrix that a line has: 2 where codes have 4 bits.
    scale: LLVM's type of the scales; None: there are none.
    factors: writes how a line of scales becomes what numbers are multiplied by.
    has_zeros: whether groups have codes of 0.
  """

  number: Any
  num_bytes: int
  numbers: Callable[[ir.IRBuilder, Any, Any], Sequence[Any]]
  rows: int = 1
  scale: Any = None
  factors: Callable[[ir.IRBuilder, Any], Any] | None = None
  has_zeros: bool = False


def constant(dtype: Any, value: int) -> ir.Constant:
  """Returns a line of an integer."""
  return ir.Constant(ir.VectorType(dtype, COLUMNS), [value] * COLUMNS)


def _float32(b: ir.IRBuilder, line: Any, zero: Any) -> Sequence[Any]:
  return (line,)


def _bfloat16(b: ir.IRBuilder, line: Any, zero: Any) -> Sequence[Any]:
  """They are the upper half of float32's bits."""
  bits = b.zext(line, ir.VectorType(emit.I32, COLUMNS))
  return (b.bitcast(b.shl(bits, constant(emit.I32, 16)), LINE),)


def _float16(b: ir.IRBuilder, line: Any, zero: Any) -> Sequence[Any]:
  return (b.fpext(line, LINE),)


def _int8(b: ir.IRBuilder, line: Any, zero: Any) -> Sequence[Any]:
  wide = b.sext(line, ir.VectorType(emit.I32, COLUMNS))
  return (b.sitofp(wide, LINE),)


def _fp8(b: ir.IRBuilder, line: Any, zero: Any) -> Sequence[Any]:
  return (_of_bits(b, line, 7, 7),)


def _int4(b: ir.IRBuilder, line: Any, zero: Any) -> Sequence[Any]:
  if zero is None:
    zero = constant(emit.I8, _INT4_ZERO)
  return [_int8(b, b.sub(half, zero), None)[0] for half in _halves(b, line)]


def _mxfp4(b: ir.IRBuilder, line: Any, zero: Any) -> Sequence[Any]:
  return [_of_bits(b, half, 3, 9) for half in _halves(b, line)]


def _halves(b: ir.IRBuilder, line: Any) -> tuple[Any, Any]:
  """Returns what bytes have in their low bits, and in their high ones."""
  return (
    b.and_(line, constant(emit.I8, 15)),
    b.lshr(line, constant(emit.I8, 4)),
  )


def _of_bits(b: ir.IRBuilder, line: Any, sign: int, up: int) -> Any:
  """Returns float16s of small floats' bits, as float32.

  Args:
    line: the bits.
    sign: the place of the sign, above all others.
    up: places from theirs to float16's.
  """
  wide = b.zext(line, ir.VectorType(_I16, COLUMNS))
  rest = b.and_(wide, constant(_I16, (1 << sign) - 1))
  signs = b.and_(wide, constant(_I16, 1 << sign))
  bits = b.or_(
    b.shl(rest, constant(_I16, up)), b.shl(signs, constant(_I16, 15 - sign))
  )
  return b.fpext(b.bitcast(bits, ir.VectorType(_HALF, COLUMNS)), LINE)


def _scales(b: ir.IRBuilder, line: Any) -> Any:
  return line


def _scales_of_fp8(b: ir.IRBuilder, line: Any) -> Any:
  return b.fmul(line, ir.Constant(LINE, [2.0**_FP8_POWER] * COLUMNS))


def _exponents(b: ir.IRBuilder, line: Any) -> Any:
  """Returns 2 ** (scale - 127), times the power that E2M1 is short of."""
  wide = b.zext(line, ir.VectorType(emit.I32, COLUMNS))
  raised = b.add(wide, constant(emit.I32, _E2M1_POWER))
  most = constant(emit.I32, _MOST_EXPONENT)
  raised = b.select(b.icmp_unsigned('<', raised, most), raised, most)
  return b.bitcast(b.shl(raised, constant(emit.I32, _MANTISSA)), LINE)


FLOAT32 = Kept(emit.F32, 4, _float32)
KEPT: Mapping[str, Kept] = {
  'float32': FLOAT32,
  'bfloat16': Kept(_I16, 2, _bfloat16),
  'float16': Kept(_HALF, 2, _float16),
  'int8': Kept(emit.I8, 1, _int8, 1, emit.F32, _scales),
  'fp8': Kept(emit.I8, 1, _fp8, 1, emit.F32, _scales_of_fp8),
  'int4': Kept(emit.I8, 1, _int4, 2, emit.F32, _scales),
  'int4_zeros': Kept(emit.I8, 1, _int4, 2, emit.F32, _scales, True),
  'mxfp4': Kept(emit.I8, 1, _mxfp4, 2, emit.I8, _exponents),
}
