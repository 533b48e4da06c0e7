# SPDX-License-Identifier: Apache-2.0
"""Writes functions of vectors of float32, number by number.

A NaN gives a NaN. Errors are those of float32's last bits.
"""

from __future__ import annotations

import math
import struct
from typing import Any

from llvmlite import ir

from pallas_kernels.llvm import emit

# exp(x) = 2**n * exp(f), where |f| <= ln(2) / 2; exp(f) by Cephes' polynomial
# (expf.c), ln(2) in two parts, of which n times the first is exact.
_LEAST, _MOST = -87.3, 88.0
_ROUNDS = 1.5 * 2**23  # added, it leaves an integer in the last bits
_LOG2_E = 1.44269504088896341
_LN_2 = (0.693359375, -2.12194440e-4)
_POLYNOMIAL = (
  1.9875691500e-4,
  1.3981999507e-3,
  8.3334519073e-3,
  4.1665795894e-2,
  1.6666665459e-1,
  5.0000001201e-1,
)
_MANTISSA = 23  # bits


def constant(like: Any, value: float) -> ir.Constant:
  """Returns a vector of a number, of a vector's type."""
  value = struct.unpack('f', struct.pack('f', value))[0]
  return ir.Constant(like.type, [value] * like.type.count)


def exp(b: ir.IRBuilder, x: Any) -> Any:
  """Returns exp(x); 0 below -87.3, infinity above 88."""
  is_nothing = b.fcmp_ordered('<', x, constant(x, _LEAST))
  is_infinite = b.fcmp_ordered('>', x, constant(x, _MOST))
  shifted = emit.fma(b, x, constant(x, _LOG2_E), constant(x, _ROUNDS))
  n = b.fsub(shifted, constant(x, _ROUNDS))
  f = x
  for part in _LN_2:
    f = emit.fma(b, n, constant(x, -part), f)
  total = constant(x, _POLYNOMIAL[0])
  for coefficient in _POLYNOMIAL[1:]:
    total = emit.fma(b, total, f, constant(x, coefficient))
  total = emit.fma(b, b.fmul(f, f), total, b.fadd(f, constant(x, 1.0)))
  bits = ir.VectorType(emit.I32, x.type.count)
  shift = ir.Constant(bits, [_MANTISSA] * x.type.count)
  exponent = b.shl(b.bitcast(shifted, bits), shift)
  scaled = b.bitcast(b.add(b.bitcast(total, bits), exponent), x.type)
  scaled = b.select(is_infinite, constant(x, math.inf), scaled)
  return b.select(is_nothing, constant(x, 0.0), scaled)


def tanh(b: ir.IRBuilder, x: Any) -> Any:
  """Returns tanh(x), to within 1e-7."""
  one, two = constant(x, 1.0), constant(x, 2.0)
  over = b.fdiv(two, b.fadd(exp(b, b.fmul(two, x)), one))
  return b.fsub(one, over)


def most(b: ir.IRBuilder, x: Any, y: Any) -> Any:
  """Returns the greater of each; x where either is NaN."""
  return b.select(b.fcmp_ordered('<', x, y), y, x)


def highest(b: ir.IRBuilder, x: Any) -> Any:
  """Returns the highest number of a vector, but for NaN."""
  name = f'llvm.vector.reduce.fmax.v{x.type.count}f32'
  called = emit.external(b.module, name, x.type, result=emit.F32)
  return b.call(called, [x])


def total(b: ir.IRBuilder, x: Any) -> Any:
  """Returns the sum of a vector, in the order of its numbers."""
  name = f'llvm.vector.reduce.fadd.v{x.type.count}f32'
  called = emit.external(b.module, name, emit.F32, x.type, result=emit.F32)
  return b.call(called, [ir.Constant(emit.F32, -0.0), x])
