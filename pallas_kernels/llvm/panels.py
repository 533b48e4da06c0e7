# SPDX-License-Identifier: Apache-2.0
"""Writes products of rows with panels, in registers: outer products.

A panel has, for each number of the inner axis, a line of `COLUMNS` columns. A
tile is some rows by some panels, whose sums stay in registers while the inner
axis is walked along: of each number of a row, multiplied by one line of each
panel. What is summed thus has one order, whatever else is computed. Tiles of
all rows follow one another for the same panels, which the first of them brings
into the cache; all ask for the next panels meanwhile. So panels are read once,
while they are multiplied. Those of 16 bits are widened in registers, exactly:
they give the bits that they would give as float32, for half of the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

from llvmlite import ir

from pallas_kernels.llvm import COLUMNS
from pallas_kernels.llvm import calls
from pallas_kernels.llvm import emit
from pallas_kernels.llvm.emit import int64

LINE = ir.VectorType(emit.F32, COLUMNS)
_CACHE_LINE = 64  # bytes


@dataclasses.dataclass(frozen=True, slots=True)
class Kept:
  """How panels keep their numbers.

  Attributes:
    number: LLVM's type of one.
    num_bytes: of one.
    widened: writes how a line of them becomes one of float32.
  """

  number: Any
  num_bytes: int
  widened: Callable[[ir.IRBuilder, Any], Any]


def _widen_bfloat16(b: ir.IRBuilder, line: Any) -> Any:
  """They are the upper half of float32's bits."""
  bits = ir.VectorType(emit.I32, COLUMNS)
  shift = ir.Constant(bits, [16] * COLUMNS)
  return b.bitcast(b.shl(b.zext(line, bits), shift), LINE)


FLOAT32 = Kept(emit.F32, 4, lambda b, line: line)
KEPT: Mapping[str, Kept] = {
  'float32': FLOAT32,
  'bfloat16': Kept(ir.IntType(16), 2, _widen_bfloat16),
  'float16': Kept(ir.HalfType(), 2, lambda b, line: b.fpext(line, LINE)),
}

# Rows and panels of a tile: registers hold its sums, a line of each panel, and
# a number of a row.
TILES: Mapping[calls.Processor, tuple[int, int]] = {
  calls.Processor(registers=32, lanes=16): (12, 2),
  calls.Processor(registers=16, lanes=8): (6, 1),
  calls.Processor(registers=32, lanes=4): (6, 1),
}


def tile() -> tuple[int, int] | None:
  """Returns rows and panels of this processor's tile; None: it has none."""
  processor = calls.processor()
  return None if processor is None else TILES[processor]


def write_matmul(
  module: ir.Module, name: str, *, adds: bool = False, kept: Kept = FLOAT32
) -> ir.Function:
  """Writes out = x @ panels, or out += x @ panels.

  The function takes x, its row's stride, panels, a panel's stride, how many
  numbers are summed, out, its row's stride, rows, panels, and where to ask for
  what comes after these panels. Strides count numbers.

  Args:
    module: where to, for this processor.
    name: of the function.
    adds: whether it adds to what is there.
    kept: how panels keep theirs; x and out are of float32.
  """
  most = tile()
  assert most is not None
  num_rows, num_panels = most
  tiles = {
    (rows, panels): _write_tile(module, name, rows, panels, adds, kept)
    for rows in range(1, num_rows + 1)
    for panels in range(1, num_panels + 1)
  }
  P, I = emit.POINTER, emit.I64
  fn, b = emit.function(module, name, P, I, P, I, I, P, I, I, I, P)
  fn.linkage = 'internal'
  x, x_stride, w, w_stride, inner, out, out_stride, rows, panels, after = (
    fn.args
  )
  full, rest = b.sdiv(rows, int64(num_rows)), b.srem(rows, int64(num_rows))
  turns = b.add(full, b.zext(b.icmp_signed('>', rest, int64(0)), emit.I64))

  def of_panels(first: Any, count: int) -> None:
    """Writes all rows' tiles for so many panels from one on."""
    here = emit.at(b, w, b.mul(first, w_stride), kept.number)
    next_panel = b.add(first, int64(count))
    is_last = b.icmp_signed('>=', next_panel, panels)
    following = emit.at(b, w, b.mul(next_panel, w_stride), kept.number)
    following = b.select(is_last, after, following)
    # Each turn asks for its share of what comes next, evenly.
    step = b.sdiv(int64(count * COLUMNS * kept.num_bytes), turns)
    to = emit.at(b, out, b.mul(first, int64(COLUMNS)))

    def of_rows(turn: Any, tile_rows: int) -> None:
      row = b.mul(turn, int64(num_rows))
      asked = b.mul(turn, b.mul(step, inner))
      b.call(
        tiles[tile_rows, count],
        [
          emit.at(b, x, b.mul(row, x_stride)),
          x_stride,
          here,
          w_stride,
          inner,
          emit.at(b, to, b.mul(row, out_stride)),
          out_stride,
          emit.at(b, following, asked, emit.I8),
          step,
        ],
      )

    def whole(turn: Any, _: list[Any]) -> list[Any]:
      of_rows(turn, num_rows)
      return []

    emit.loop(b, full, whole)
    end = b.append_basic_block('end')
    switch = b.switch(rest, end)
    for tile_rows in range(1, num_rows):
      block = b.append_basic_block(f'rest_{tile_rows}')
      switch.add_case(int64(tile_rows), block)
      b.position_at_end(block)
      of_rows(full, tile_rows)
      b.branch(end)
    b.position_at_end(end)

  loops = b.sdiv(panels, int64(num_panels))

  def several(i: Any, _: list[Any]) -> list[Any]:
    of_panels(b.mul(i, int64(num_panels)), num_panels)
    return []

  emit.loop(b, loops, several)
  if num_panels > 1:
    done = b.mul(loops, int64(num_panels))

    def one(i: Any, _: list[Any]) -> list[Any]:
      of_panels(b.add(i, done), 1)
      return []

    emit.loop(b, b.sub(panels, done), one)
  b.ret_void()
  return fn


def _write_tile(
  module: ir.Module,
  name: str,
  num_rows: int,
  num_panels: int,
  adds: bool,
  kept: Kept,
) -> ir.Function:
  """Writes a tile; arguments as of the product, and where and how to ask.

  `following` is where to ask for lines that are needed later, `step` the bytes
  to go on there for each number of the inner axis.
  """
  P, I = emit.POINTER, emit.I64
  fn, b = emit.function(
    module, f'{name}.{num_rows}.{num_panels}', P, I, P, I, I, P, I, P, I
  )
  fn.linkage = 'internal'
  x, x_stride, w, w_stride, inner, out, out_stride, following, step = fn.args
  rows = [emit.at(b, x, b.mul(x_stride, int64(i))) for i in range(num_rows)]
  panels = [
    emit.at(b, w, b.mul(w_stride, int64(i)), kept.number)
    for i in range(num_panels)
  ]
  line = ir.VectorType(kept.number, COLUMNS)
  num_asked = -(-num_panels * COLUMNS * kept.num_bytes // _CACHE_LINE)
  places = [
    emit.at(b, emit.at(b, out, b.mul(out_stride, int64(i))), int64(COLUMNS * j))
    for i in range(num_rows)
    for j in range(num_panels)
  ]

  def turn(i: Any, sums: list[Any]) -> list[Any]:
    lines = [
      kept.widened(
        b, b.load(emit.at(b, panel, i, line), align=kept.num_bytes, typ=line)
      )
      for panel in panels
    ]
    asked = emit.at(b, following, b.mul(i, step), emit.I8)
    for ahead in range(num_asked):
      emit.prefetch(b, emit.at(b, asked, int64(ahead * _CACHE_LINE), emit.I8))
    new: list[Any] = []
    for row in rows:
      number = b.load(emit.at(b, row, i), typ=emit.F32)
      numbers = emit.splat(b, number, COLUMNS)
      new += [
        emit.fma(b, numbers, of_panel, sums[len(new) + j])
        for j, of_panel in enumerate(lines)
      ]
    return new

  zeros = ir.Constant(LINE, [0.0] * COLUMNS)
  first = [b.load(p, align=4, typ=LINE) if adds else zeros for p in places]
  for total, place in zip(
    emit.loop(b, inner, turn, first), places, strict=True
  ):
    b.store(total, place, align=4)
  b.ret_void()
  return fn
