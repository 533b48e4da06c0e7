# SPDX-License-Identifier: Apache-2.0
"""The kernel, whose pieces are some panels, for all groups of rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from pallas_kernels.llvm import COLUMNS
from pallas_kernels.llvm import calls
from pallas_kernels.llvm import codes
from pallas_kernels.llvm import emit
from pallas_kernels.llvm import kept as kept_lib
from pallas_kernels.llvm import panels
from pallas_kernels.llvm import threads
from pallas_kernels.llvm.emit import int64

_PIECES_OF_A_THREAD = 4  # for one may be kept from its core


def register(
  target: str, num_devices: int, kept: kept_lib.Kept = kept_lib.FLOAT32
) -> bool:
  """Compiles the kernel and tells XLA of it.

  Args:
    target: the name by which XLA calls it.
    num_devices: who share the threads that XLA computes with.
    kept: how panels keep their numbers.

  Returns:
    Whether there is one for this processor.
  """
  tile = panels.tile()
  if tile is None:
    return False
  module = ir.Module(target)
  ranks = 2, 3, 1, *((3, 3, 1) if kept.scale else ())
  calls.write_handler(
    module, target, (ranks, (2,)), _handler(module, num_devices, tile[1], kept)
  )
  calls.compile_handler(module, target)
  return True


def _handler(
  module: ir.Module, num_devices: int, num_panels: int, kept: kept_lib.Kept
) -> Callable[[ir.IRBuilder, calls.Frame], None]:
  """Returns what writes the call.

  Arguments are rows [R, in], panels [G, out / COLUMNS, in * COLUMNS] and the
  groups' sizes [G] int32; of codes their scales and codes of 0, which are
  [G, out / COLUMNS, groups of rows * COLUMNS], and the rows of a group, [1]
  int32. The result is [R, out].
  """
  multiply = codes.write_matmul(module, 'matmul', kept)

  def piece(b: ir.IRBuilder, number: Any, values: list[Any]) -> None:
    x, w, sizes, out, groups, num_in, num_out, stride, most = values[:9]
    first = b.mul(number, most)
    of_matrix = b.sdiv(num_out, int64(COLUMNS))
    left = b.sub(of_matrix, first)
    count = b.select(b.icmp_signed('<', most, left), most, left)
    to = emit.at(b, out, b.mul(first, int64(COLUMNS)))

    def of_group(
      after: Any, here: Any, start: Any, size: Any, *coded: Any
    ) -> None:
      with b.if_then(b.icmp_signed('>', size, int64(0))):
        b.call(
          multiply,
          [
            emit.at(b, x, b.mul(start, num_in)),
            num_in,
            here,
            stride,
            num_in,
            emit.at(b, to, b.mul(start, num_out)),
            num_out,
            size,
            count,
            after,
            *coded,
            *values[11:],
          ],
        )

    # A group waits for the next one with rows, whose panels it asks for.
    def group(i: Any, carried: list[Any]) -> list[Any]:
      start, *waiting = carried
      size = b.load(emit.at(b, sizes, i, emit.I32), typ=emit.I32)
      size = b.sext(size, emit.I64)
      panel = b.add(b.mul(i, of_matrix), first)
      here = emit.at(b, w, b.mul(panel, stride), kept.number)
      found = [here, start, size]
      if kept.scale:
        scale, zero, num_groups, _ = values[9:]
        before = b.mul(panel, b.mul(num_groups, int64(COLUMNS)))
        found.append(emit.at(b, scale, before, kept.scale))
        found.append(emit.at(b, zero, before, emit.I8))
      has_rows = b.icmp_signed('>', size, int64(0))
      with b.if_then(has_rows):
        of_group(found[0], *waiting)
      return [
        b.add(start, size),
        *(
          b.select(has_rows, new, old)
          for new, old in zip(found, waiting, strict=True)
        ),
      ]

    none = [int64(0), w, int64(0), int64(0), *values[9:11]]
    _, *last = emit.loop(b, groups, group, none)
    end = emit.at(b, last[0], b.mul(count, stride), kept.number)
    of_group(end, *last)

  types = [*[emit.POINTER] * 4, *[emit.I64] * 5]
  if kept.scale:
    types += [*[emit.POINTER] * 2, *[emit.I64] * 2]
  share = threads.write_sharing(module, piece, types)

  def write(b: ir.IRBuilder, frame: calls.Frame) -> None:
    x, w, sizes, *coded = frame.arguments
    (out,) = frame.results
    of_codes: list[Any] = []
    if coded:
      scale, zero, group = coded
      rows = b.load(group.data, typ=emit.I32)
      num_groups = b.sdiv(scale.dims[2], int64(COLUMNS))
      of_codes = [scale.data, zero.data, num_groups, b.sext(rows, emit.I64)]
    num_threads = threads.number_of(b, frame, num_devices)
    pieces = b.mul(num_threads, int64(_PIECES_OF_A_THREAD))
    is_one = b.icmp_signed('==', num_threads, int64(1))
    pieces = b.select(is_one, num_threads, pieces)
    # Whole tiles of panels, side by side in memory.
    total, tile = w.dims[1], int64(num_panels)
    most = b.mul(_quotient(b, total, b.mul(pieces, tile)), tile)
    share(
      b,
      frame,
      num_threads,
      _quotient(b, total, most),
      [
        *(buffer.data for buffer in (x, w, sizes, out)),
        sizes.dims[0],
        x.dims[1],
        out.dims[1],
        w.dims[2],
        most,
        *of_codes,
      ],
    )

  return write


def _quotient(b: ir.IRBuilder, x: Any, y: Any) -> Any:
  """Returns x / y, rounded up."""
  return b.sdiv(b.sub(b.add(x, y), int64(1)), y)
