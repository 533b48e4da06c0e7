# SPDX-License-Identifier: Apache-2.0
"""Writes LLVM's IR: what `llvmlite.ir.IRBuilder` lacks for kernels.

Integers are of 64 bits, and pointers know of no type, as LLVM's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

I8, I32, I64 = (ir.IntType(bits) for bits in (8, 32, 64))
F32 = ir.FloatType()
POINTER = ir.PointerType()
VOID = ir.VoidType()

_IN_L2 = 2  # of prefetch's localities: 3 is the first cache


def int64(value: int) -> ir.Constant:
  """Returns a constant."""
  return ir.Constant(I64, value)


def function(
  module: ir.Module, name: str, *arguments: Any, result: Any = VOID
) -> tuple[ir.Function, ir.IRBuilder]:
  """Begins a function; returns it, and what writes its body."""
  made = ir.Function(module, ir.FunctionType(result, arguments), name)
  return made, ir.IRBuilder(made.append_basic_block())


def external(
  module: ir.Module, name: str, *arguments: Any, result: Any = VOID
) -> ir.Function:
  """Returns a function of the process, such as libc's."""
  return module.globals.get(name) or ir.Function(
    module, ir.FunctionType(result, arguments), name
  )


def local(b: ir.IRBuilder, count: int) -> Any:
  """Returns the address of so many times 8 bytes, the function's own."""
  return b.alloca(POINTER, size=count)


def local_floats(b: ir.IRBuilder, count: Any) -> Any:
  """Returns the address of so many float32s, the function's own."""
  return b.alloca(POINTER, size=b.sdiv(b.add(count, int64(1)), int64(2)))


def at(b: ir.IRBuilder, base: Any, index: Any, dtype: Any = F32) -> Any:
  """Returns the address of base[index], of numbers of a dtype."""
  return b.gep(base, [index], source_etype=dtype)


def loop(
  b: ir.IRBuilder,
  count: Any,
  body: Callable[[Any, list[Any]], Sequence[Any]],
  carried: Sequence[Any] = (),
) -> list[Any]:
  """Writes `for i in range(count): carried = body(i, carried)`.

  Returns:
    What is carried behind the loop.
  """
  before, turn, after = (
    b.block,
    b.append_basic_block('turn'),
    b.append_basic_block('after'),
  )
  b.cbranch(b.icmp_signed('>', count, int64(0)), turn, after)
  b.position_at_end(turn)
  i = b.phi(I64)
  values = [b.phi(value.type) for value in carried]
  new = body(i, values)
  following = b.add(i, int64(1))
  last = b.block
  b.cbranch(b.icmp_signed('<', following, count), turn, after)
  b.position_at_end(after)
  out = [b.phi(value.type) for value in carried]
  for phi, first, then in zip(
    (i, *values, *out),
    (int64(0), *carried, *carried),
    (following, *new, *new),
    strict=True,
  ):
    phi.add_incoming(first, before)
    phi.add_incoming(then, last)
  return out


def splat(b: ir.IRBuilder, number: Any, lanes: int) -> Any:
  """Returns a vector of so many times a number."""
  undefined = ir.Constant(ir.VectorType(number.type, lanes), ir.Undefined)
  first = b.insert_element(undefined, number, ir.Constant(I32, 0))
  zeros = ir.Constant(ir.VectorType(I32, lanes), [0] * lanes)
  return b.shuffle_vector(first, undefined, zeros)


def fma(b: ir.IRBuilder, x: Any, y: Any, z: Any) -> Any:
  """Returns x * y + z of vectors, rounded once."""
  name = f'llvm.fma.v{x.type.count}f32'
  called = external(b.module, name, *[x.type] * 3, result=x.type)
  return b.call(called, [x, y, z])


def prefetch(b: ir.IRBuilder, address: Any) -> None:
  """Asks for a cache line, which need not be there, nor anybody's."""
  name = 'llvm.prefetch.p0'
  called = external(b.module, name, POINTER, I32, I32, I32)
  reads, data = ir.Constant(I32, 0), ir.Constant(I32, 1)
  b.call(called, [address, reads, ir.Constant(I32, _IN_L2), data])
