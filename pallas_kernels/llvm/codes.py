# SPDX-License-Identifier: Apache-2.0
"""Writes products of rows with panels of codes, however many rows there are.

Few rows are multiplied by codes as these are read. With many, each line would
become numbers again for each tile of them: then some rows of the matrix become
numbers once, in memory that stays in the cache, which all rows are multiplied
by. What is summed, and its order, is the same.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from pallas_kernels.llvm import COLUMNS
from pallas_kernels.llvm import emit
from pallas_kernels.llvm import kept as kept_lib
from pallas_kernels.llvm import panels
from pallas_kernels.llvm.emit import int64

_FEW_TILES = 2  # of rows, for which codes become numbers each time
_ROWS = 256  # of the matrix, that are numbers at a time: 32 KiB of two panels


def write_matmul(
  module: ir.Module, name: str, kept: kept_lib.Kept
) -> ir.Function:
  """Writes out = x @ panels; arguments as of `panels.write_matmul` of codes."""
  few = panels.write_matmul(module, f'{name}.few', kept=kept)
  if kept.scale is None:
    return few
  many = panels.write_matmul(module, f'{name}.many', adds=True)
  widen = panels.write_widening(module, f'{name}.widen', kept)
  most = panels.tile()
  assert most is not None
  num_rows, num_panels = most
  fn, b = emit.function(module, name, *(one.type for one in few.args))
  fn.linkage = 'internal'
  x, x_stride, w, w_stride, inner, out, out_stride, rows, num, _ = fn.args[:10]
  scale, zero, num_groups, group = fn.args[10:]
  numbers = emit.local_floats(b, int64(_ROWS * COLUMNS * num_panels))
  with b.if_then(b.icmp_signed('<=', rows, int64(_FEW_TILES * num_rows))):
    b.call(few, fn.args)
    b.ret_void()
  _clear(b, out, out_stride, rows, num)

  def of_panels(first: Any, count: int) -> None:
    def of_group(number: Any, _: list[Any]) -> list[Any]:
      start = b.mul(number, group)
      size = _lesser(b, group, b.sub(inner, start))

      def some(i: Any, _: list[Any]) -> list[Any]:
        done = b.mul(i, int64(_ROWS))
        here = b.add(start, done)
        length = _lesser(b, int64(_ROWS), b.sub(size, done))
        for j in range(count):
          panel = b.add(first, int64(j))
          index = b.add(b.mul(panel, num_groups), number)
          at = b.mul(index, int64(COLUMNS))
          b.call(
            widen,
            [
              emit.at(b, w, b.mul(panel, w_stride), kept.number),
              here,
              length,
              emit.at(b, scale, at, kept.scale),
              emit.at(b, zero, at, emit.I8),
              emit.at(b, numbers, int64(j * _ROWS * COLUMNS)),
            ],
          )
        b.call(
          many,
          [
            emit.at(b, x, here),
            x_stride,
            numbers,
            int64(_ROWS * COLUMNS),
            length,
            emit.at(b, out, b.mul(first, int64(COLUMNS))),
            out_stride,
            rows,
            int64(count),
            numbers,
          ],
        )
        return []

      turns = b.sdiv(b.add(size, int64(_ROWS - 1)), int64(_ROWS))
      emit.loop(b, turns, some)
      return []

    emit.loop(b, num_groups, of_group)

  panels.write_each(b, num, num_panels, of_panels)
  b.ret_void()
  return fn


def _lesser(b: ir.IRBuilder, x: Any, y: Any) -> Any:
  return b.select(b.icmp_signed('<', x, y), x, y)


def _clear(
  b: ir.IRBuilder, out: Any, stride: Any, rows: Any, num_panels: Any
) -> None:
  """Writes zeros to what is added to."""
  zeros = ir.Constant(kept_lib.LINE, [0.0] * COLUMNS)

  def row(i: Any, _: list[Any]) -> list[Any]:
    here = emit.at(b, out, b.mul(i, stride))

    def panel(j: Any, _: list[Any]) -> list[Any]:
      b.store(zeros, emit.at(b, here, j, kept_lib.LINE), align=4)
      return []

    emit.loop(b, num_panels, panel)
    return []

  emit.loop(b, rows, row)
