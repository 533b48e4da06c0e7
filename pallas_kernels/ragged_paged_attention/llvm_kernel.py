# SPDX-License-Identifier: Apache-2.0
"""The kernel for CPUs: an online softmax between two products with panels.

Keys of a page are panels of 16 positions, whose inner axis are channels; values
are panels of 16 channels, whose inner axis are positions (`layout.LINES`). So
both products are `panels.write_matmul`'s, of pages as they lie. Rows are the
queries of one key head, of one or several tokens of a sequence, as many as a
tile of it has, so that a page is read once for all of them. They are a piece of
work; pieces of chunks come first, as these take the longest.

A row's numbers depend on no other row: what it may not see weighs exactly 0,
and pages are taken in the order of positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from pallas_kernels.llvm import calls
from pallas_kernels.llvm import emit
from pallas_kernels.llvm import panels
from pallas_kernels.llvm import threads
from pallas_kernels.llvm.emit import int64
from pallas_kernels.llvm.panels import COLUMNS
from pallas_kernels.ragged_paged_attention import llvm_rows

# Ranks of q, keys, values, kv_lens, page_indices, cu_q_lens, distribution,
# sinks, (scale, soft cap), (window, whether there are sinks, and a cap).
_RANKS = (3, 5, 5, 1, 2, 1, 1, 1, 1, 1)
_MOST_SEQS_BITS = 20
_TYPES = [*[emit.POINTER] * 11, *[emit.I64] * 6]  # of `Work`


def register(target: str, num_devices: int) -> bool:
  """Compiles the kernel and tells XLA of it; see `panel_matmul.kernel`."""
  tile = panels.tile()
  if tile is None:
    return False
  module = ir.Module(target)
  calls.write_handler(
    module, target, (_RANKS, (3,)), _handler(module, num_devices, tile[0])
  )
  calls.compile_handler(module, target)
  return True


def _handler(
  module: ir.Module, num_devices: int, num_rows: int
) -> Callable[[ir.IRBuilder, calls.Frame], None]:
  attend = _write_attend(module, num_rows)

  def piece(b: ir.IRBuilder, number: Any, values: list[Any]) -> None:
    work = llvm_rows.Work._make(values)
    tile = b.sdiv(number, work.num_kv_heads)
    head = b.srem(number, work.num_kv_heads)
    # The first sequence whose pieces end behind the tile.
    found = int64(0)
    for bit in reversed(range(_MOST_SEQS_BITS)):
      tried = b.add(found, int64((1 << bit) - 1))
      is_in = b.icmp_signed('<', tried, work.num_seqs)
      tried = b.select(is_in, tried, int64(0))
      end = llvm_rows.int_at(b, work.ends, b.add(tried, int64(1)), emit.I64)
      is_before = b.and_(is_in, b.icmp_signed('<=', end, tile))
      found = b.select(is_before, b.add(tried, int64(1)), found)
    begin = llvm_rows.int_at(b, work.ends, found, emit.I64)
    seq = b.sub(b.sub(work.num_seqs, int64(1)), found)
    row = b.mul(b.sub(tile, begin), int64(num_rows))
    b.call(attend, [*values, seq, head, row])

  share = threads.write_sharing(module, piece, _TYPES)

  def write(b: ir.IRBuilder, frame: calls.Frame) -> None:
    (
      q, keys, values, kv_lens, tables, starts, distribution, sinks, floats,
      ints,
    ) = frame.arguments  # fmt: skip
    (out,) = frame.results
    num_tokens, num_heads, head_dim = q.dims
    num_kv_heads = keys.dims[1]
    group = b.sdiv(num_heads, num_kv_heads)
    num_seqs = llvm_rows.int_at(b, distribution.data, int64(1))
    ends = b.alloca(emit.POINTER, size=b.add(num_seqs, int64(1)))

    def count(i: Any, carried: list[Any]) -> list[Any]:
      seq = b.sub(b.sub(num_seqs, int64(1)), i)
      begin = llvm_rows.int_at(b, starts.data, seq)
      end = llvm_rows.int_at(b, starts.data, b.add(seq, int64(1)))
      rows = b.mul(b.sub(end, begin), group)
      tiles = b.sdiv(b.add(rows, int64(num_rows - 1)), int64(num_rows))
      total = b.add(carried[0], tiles)
      b.store(total, emit.at(b, ends, b.add(i, int64(1)), emit.I64))
      return [total]

    b.store(int64(0), ends)
    (tiles,) = emit.loop(b, num_seqs, count, [int64(0)])
    last = llvm_rows.int_at(b, starts.data, num_seqs)
    width = b.mul(num_heads, head_dim)

    def pad(i: Any, carried: list[Any]) -> list[Any]:
      at = b.add(b.mul(last, width), i)
      b.store(ir.Constant(emit.F32, 0.0), emit.at(b, out.data, at))
      return carried

    emit.loop(b, b.mul(b.sub(num_tokens, last), width), pad)
    read = (q, keys, values, kv_lens, tables, starts, sinks, floats, ints)
    work = llvm_rows.Work._make(
      [
        *(buffer.data for buffer in (*read, out)),
        ends,
        num_seqs,
        num_heads,
        num_kv_heads,
        head_dim,
        values.dims[3],
        tables.dims[1],
      ]
    )
    pieces = b.mul(tiles, num_kv_heads)
    num_threads = threads.number_of(b, frame, num_devices)
    share(b, frame, num_threads, pieces, work)

  return write


def _write_attend(module: ir.Module, num_rows: int) -> ir.Function:
  """Writes what computes a piece: of `Work`, a sequence, a key head and a row.

  Rows are a sequence's tokens, each with the query heads of the key head.
  """
  score = panels.write_matmul(module, 'score')
  mix = panels.write_matmul(module, 'mix', adds=True)
  fn, b = emit.function(module, 'attend', *_TYPES, *[emit.I64] * 3)
  fn.linkage = 'internal'
  work, (seq, head, first) = llvm_rows.Work._make(fn.args[:-3]), fn.args[-3:]
  h, page_size = work.head_dim, work.page_size
  piece = llvm_rows.Rows.of(b, work, seq, head, first, num_rows)
  piece.each_row(piece.begin)
  _, lowest = piece.place(int64(0))
  _, highest = piece.place(b.sub(piece.rows, int64(1)))
  stop = b.add(highest, int64(1))
  least = llvm_rows.positive(b, b.sub(b.add(lowest, int64(1)), piece.window))
  first_page, last_page = (b.sdiv(at, page_size) for at in (least, highest))
  size = b.mul(page_size, h)  # of a head's part of a page

  def page_at(index: Any) -> Any:
    page = llvm_rows.int_at(
      b, work.tables, b.add(b.mul(seq, work.max_pages), index)
    )
    return b.mul(b.add(b.mul(page, work.num_kv_heads), head), size)

  def page(i: Any, carried: list[Any]) -> list[Any]:
    index = b.add(first_page, i)
    here = page_at(index)
    keys, values = (emit.at(b, x, here) for x in (work.keys, work.values))
    following = page_at(llvm_rows.lesser(b, b.add(index, int64(1)), last_page))
    offset = b.mul(index, page_size)
    # Outside of these, others' numbers may lie, which may be NaN.
    seen_from = llvm_rows.positive(b, b.sub(least, offset))
    seen_to = llvm_rows.lesser(b, b.sub(stop, offset), page_size)
    lines = b.sdiv(b.add(seen_to, int64(COLUMNS - 1)), int64(COLUMNS))
    to_scores = piece.scores, page_size, piece.rows, lines, values
    stride = b.mul(h, int64(COLUMNS))
    b.call(score, [piece.queries, h, keys, stride, h, *to_scores])
    piece.each_row(lambda row: piece.weigh(row, offset, lines))
    weights = emit.at(b, piece.scores, seen_from), page_size
    seen = emit.at(b, values, b.mul(seen_from, int64(COLUMNS)))
    stride = b.mul(page_size, int64(COLUMNS))
    count = b.sub(seen_to, seen_from)
    to_mixed = piece.mixed, h, piece.rows, piece.lines_of_head
    after = emit.at(b, work.keys, following)
    b.call(mix, [*weights, seen, stride, count, *to_mixed, after])
    return carried

  emit.loop(b, b.add(b.sub(last_page, first_page), int64(1)), page)
  piece.each_row(piece.end)
  b.ret_void()
  return fn
