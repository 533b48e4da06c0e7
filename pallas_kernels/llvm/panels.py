# SPDX-License-Identifier: Apache-2.0
"""Writes products of rows with panels, in registers: outer products.

A panel has, for each number of the inner axis, a line of `COLUMNS` columns. A
tile is some rows by some panels, whose sums stay in registers while the inner
axis is walked along: of each number of a row, multiplied by one line of each
panel. What is summed thus has one order, whatever else is computed. Tiles of
all rows follow one another for the same panels, which the first of them brings
into the cache; all ask for the next panels meanwhile. So panels are read once,
while they are multiplied. What they keep in fewer bits becomes float32 in
registers (`kept`): those of 16 bits give the bits that they would give as
float32, for half of the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llvmlite import ir

from pallas_kernels.llvm import COLUMNS
from pallas_kernels.llvm import calls
from pallas_kernels.llvm import emit
from pallas_kernels.llvm import kept as kept_lib
from pallas_kernels.llvm.emit import int64
from pallas_kernels.llvm.kept import LINE
from pallas_kernels.llvm.kept import Kept

_CACHE_LINE = 64  # bytes

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
  module: ir.Module,
  name: str,
  *,
  adds: bool = False,
  kept: Kept = kept_lib.FLOAT32,
) -> ir.Function:
  """Writes out = x @ panels, or out += x @ panels.

  The function takes x, its row's stride, panels, a panel's stride, how many
  numbers are summed, out, its row's stride, rows, panels, and where to ask for
  what comes after these panels. Strides count what lines have. Of codes it also
  takes their scales and codes of 0, each in panels, how many groups there are,
  and the rows of one.

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
  of_groups = (P, P, I, I) if kept.scale else ()
  fn, b = emit.function(module, name, P, I, P, I, I, P, I, I, I, P, *of_groups)
  fn.linkage = 'internal'
  x, x_stride, w, w_stride, inner, out, out_stride, rows, panels, after = (
    fn.args[:10]
  )
  num_lines = b.sdiv(inner, int64(kept.rows))
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
    groups: Sequence[Any] = ()
    if kept.scale:
      scale, zero, num_groups, group = fn.args[10:]
      before = b.mul(first, b.mul(num_groups, int64(COLUMNS)))
      groups = (
        emit.at(b, scale, before, kept.scale),
        emit.at(b, zero, before, emit.I8),
        num_groups,
        group,
      )

    def of_rows(turn: Any, tile_rows: int) -> None:
      row = b.mul(turn, int64(num_rows))
      asked = b.mul(turn, b.mul(step, num_lines))
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
          *groups,
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

  write_each(b, panels, num_panels, of_panels)
  b.ret_void()
  return fn


def write_each(
  b: ir.IRBuilder, num: Any, most: int, body: Callable[[Any, int], None]
) -> None:
  """Writes a body for so many panels at a time, and for each that is left."""
  loops = b.sdiv(num, int64(most))

  def several(i: Any, _: list[Any]) -> list[Any]:
    body(b.mul(i, int64(most)), most)
    return []

  emit.loop(b, loops, several)
  if most > 1:
    done = b.mul(loops, int64(most))

    def one(i: Any, _: list[Any]) -> list[Any]:
      body(b.add(i, done), 1)
      return []

    emit.loop(b, b.sub(num, done), one)


def write_widening(module: ir.Module, name: str, kept: Kept) -> ir.Function:
  """Writes how some rows' codes become lines of float32, for `write_matmul`.

  The function takes a panel, the first row and how many, their group's line of
  scales and of codes of 0, and where to write lines to.
  """
  P, I = emit.POINTER, emit.I64
  fn, b = emit.function(module, name, P, I, I, P, P, P)
  fn.linkage = 'internal'
  panel, start, count, scale, zero, out = fn.args
  line = ir.VectorType(kept.number, COLUMNS)
  here = emit.at(b, panel, b.sdiv(start, int64(kept.rows)), line)
  of_group = _of_group(b, kept, scale, zero, int64(0))

  def turn(i: Any, _: list[Any]) -> list[Any]:
    read = b.load(emit.at(b, here, i, line), align=kept.num_bytes, typ=line)
    first = b.mul(i, int64(kept.rows))
    for part, numbers in enumerate(_numbers(b, kept, read, of_group)):
      to = emit.at(b, out, b.add(first, int64(part)), LINE)
      b.store(numbers, to, align=4)
    return []

  emit.loop(b, b.sdiv(count, int64(kept.rows)), turn)
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
  types = P, I, P, I, I, P, I, P, I, *((P, P, I, I) if kept.scale else ())
  fn, b = emit.function(module, f'{name}.{num_rows}.{num_panels}', *types)
  fn.linkage = 'internal'
  x, x_stride, w, w_stride, inner, out, out_stride, following, step = fn.args[
    :9
  ]
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

  def add(
    start: Any, count: Any, groups: Sequence[Any], sums: list[Any]
  ) -> list[Any]:
    """Adds the products of some rows of the matrix, from one on.

    Args:
      start, count: the rows.
      groups: what their numbers are multiplied by, and their codes of 0, of
        each panel.
      sums: what to add to.
    """
    before = b.sdiv(start, int64(kept.rows))

    def turn(i: Any, sums: list[Any]) -> list[Any]:
      at = b.add(before, i)
      lines = [
        _numbers(
          b,
          kept,
          b.load(emit.at(b, panel, at, line), align=kept.num_bytes, typ=line),
          of_panel,
        )
        for panel, of_panel in zip(panels, groups, strict=True)
      ]
      asked = emit.at(b, following, b.mul(at, step), emit.I8)
      for ahead in range(num_asked):
        emit.prefetch(b, emit.at(b, asked, int64(ahead * _CACHE_LINE), emit.I8))
      first = b.add(start, b.mul(i, int64(kept.rows)))
      for part in range(kept.rows):
        place = b.add(first, int64(part))
        for index, row in enumerate(rows):
          number = b.load(emit.at(b, row, place), typ=emit.F32)
          numbers = emit.splat(b, number, COLUMNS)
          for j in range(num_panels):
            to = index * num_panels + j
            sums = list(sums)
            sums[to] = emit.fma(b, numbers, lines[j][part], sums[to])
      return sums

    return emit.loop(b, b.sdiv(count, int64(kept.rows)), turn, sums)

  zeros = ir.Constant(LINE, [0.0] * COLUMNS)
  first = [b.load(p, align=4, typ=LINE) if adds else zeros for p in places]
  if kept.scale:
    totals = _each_group(b, kept, num_panels, inner, fn.args[9:], add, first)
  else:
    totals = add(int64(0), inner, [None] * num_panels, first)
  for total, place in zip(totals, places, strict=True):
    b.store(total, place, align=4)
  b.ret_void()
  return fn


def _numbers(
  b: ir.IRBuilder, kept: Kept, line: Any, of_group: tuple[Any, Any] | None
) -> Sequence[Any]:
  """Writes how a line becomes a line of float32 for each of its rows."""
  if of_group is None:
    return kept.numbers(b, line, None)
  factors, zero = of_group
  return [b.fmul(x, factors) for x in kept.numbers(b, line, zero)]


def _of_group(
  b: ir.IRBuilder, kept: Kept, scale: Any, zero: Any, index: Any
) -> tuple[Any, Any]:
  """Reads a group's lines: what numbers are multiplied by, and codes of 0."""
  scales = ir.VectorType(kept.scale, COLUMNS)
  zeros = ir.VectorType(emit.I8, COLUMNS)
  assert kept.factors is not None
  raw = b.load(emit.at(b, scale, index, scales), align=1, typ=scales)
  of_zero = None
  if kept.has_zeros:
    of_zero = b.load(emit.at(b, zero, index, zeros), align=1, typ=zeros)
  return kept.factors(b, raw), of_zero


def _each_group(
  b: ir.IRBuilder,
  kept: Kept,
  num_panels: int,
  inner: Any,
  arguments: Sequence[Any],
  add: Callable[[Any, Any, Sequence[Any], list[Any]], list[Any]],
  sums: list[Any],
) -> list[Any]:
  """Writes the sums of all groups of rows, one group after the other.

  Args:
    b, kept, num_panels, inner: of the tile.
    arguments: of it, that are of groups.
    add, sums: what adds some rows' products to sums, and the first ones.
  """
  scale, zero, num_groups, group = arguments

  def of_group(number: Any, sums: list[Any]) -> list[Any]:
    start = b.mul(number, group)
    left = b.sub(inner, start)
    count = b.select(b.icmp_signed('<', group, left), group, left)
    of_panels = []
    for j in range(num_panels):
      index = b.add(b.mul(num_groups, int64(j)), number)
      of_panels.append(_of_group(b, kept, scale, zero, index))
    return add(start, count, of_panels, sums)

  return emit.loop(b, num_groups, of_group, sums)
