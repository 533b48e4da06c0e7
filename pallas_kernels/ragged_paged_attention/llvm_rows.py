# SPDX-License-Identifier: Apache-2.0
"""What `llvm_kernel` does for each row, beside its products."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

from llvmlite import ir

from pallas_kernels.llvm import emit
from pallas_kernels.llvm import functions
from pallas_kernels.llvm.emit import int64
from pallas_kernels.llvm.panels import COLUMNS
from pallas_kernels.llvm.panels import LINE

_MASKED = -1e30  # finite: the difference of two of them is no NaN
_ZEROS = ir.Constant(LINE, [0.0] * COLUMNS)
_COUNT = ir.Constant(ir.VectorType(emit.I32, COLUMNS), list(range(COLUMNS)))


class Work(NamedTuple):
  """What a piece is of; pointers, then int64s."""

  q: Any
  keys: Any
  values: Any
  kv_lens: Any
  tables: Any
  starts: Any  # cu_q_lens
  sinks: Any
  floats: Any
  ints: Any
  out: Any
  ends: Any  # 0, and where each sequence's tiles end, from the last on
  num_seqs: Any
  num_heads: Any
  num_kv_heads: Any
  head_dim: Any
  page_size: Any
  max_pages: Any


@dataclasses.dataclass(frozen=True, slots=True)
class Rows:
  """Writes what is done for each row of a piece.

  Attributes:
    b: writes.
    work: what it is a piece of.
    head: the key head.
    first: of its rows, among the sequence's.
    rows: how many there are.
    group: query heads of a key head.
    start: token of the batch that the sequence begins with.
    before: position of that token.
    window: see `api`.
    queries, mixed: [rows, h], scaled queries and what will be the output.
    scores: [rows, page_size], then weights.
    norms: [rows, COLUMNS], whose sums are those of the weights.
    tops: [rows], the highest score yet.
  """

  b: ir.IRBuilder
  work: Work
  head: Any
  first: Any
  rows: Any
  group: Any
  start: Any
  before: Any
  window: Any
  queries: Any
  mixed: Any
  scores: Any
  norms: Any
  tops: Any

  @classmethod
  def of(
    cls,
    b: ir.IRBuilder,
    work: Work,
    seq: Any,
    head: Any,
    first: Any,
    num_rows: int,
  ) -> Rows:
    """Writes what is the same for all rows."""

    def scratch(columns: Any) -> Any:
      return emit.local_floats(b, b.mul(columns, int64(num_rows)))

    group = b.sdiv(work.num_heads, work.num_kv_heads)
    start, end = (
      int_at(b, work.starts, b.add(seq, int64(i))) for i in range(2)
    )
    num_tokens = b.sub(end, start)
    return cls(
      b,
      work,
      head,
      first,
      rows=lesser(b, b.sub(b.mul(num_tokens, group), first), int64(num_rows)),
      group=group,
      start=start,
      before=b.sub(int_at(b, work.kv_lens, seq), num_tokens),
      window=int_at(b, work.ints, int64(0)),
      queries=scratch(work.head_dim),
      mixed=scratch(work.head_dim),
      scores=scratch(work.page_size),
      norms=scratch(int64(COLUMNS)),
      tops=scratch(int64(1)),
    )

  @property
  def lines_of_head(self) -> Any:
    return self.b.sdiv(self.work.head_dim, int64(COLUMNS))

  def each_row(self, write: Callable[[Any], None]) -> None:
    """Writes a loop over the rows."""
    _each(self.b, self.rows, write)

  def place(self, row: Any) -> tuple[Any, Any]:
    """Returns where a row is among the batch's queries, and its position."""
    b = self.b
    row = b.add(self.first, row)
    token = b.sdiv(row, self.group)
    query = b.add(b.mul(self.head, self.group), b.srem(row, self.group))
    where = b.add(b.mul(b.add(self.start, token), self.work.num_heads), query)
    return b.mul(where, self.work.head_dim), b.add(self.before, token)

  def begin(self, row: Any) -> None:
    """Writes the row's query, scaled, and that nothing was seen yet."""
    b = self.b
    where, _ = self.place(row)
    scale = emit.splat(b, b.load(self.work.floats, typ=emit.F32), COLUMNS)

    def line(i: Any) -> None:
      given = _load(b, _line(b, self.work.q, where, i))
      to = b.mul(row, self.work.head_dim)
      _store(b, b.fmul(given, scale), _line(b, self.queries, to, i))
      _store(b, _ZEROS, _line(b, self.mixed, to, i))

    _each(b, self.lines_of_head, line)
    _store(b, _ZEROS, _line(b, self.norms, int64(0), row))
    b.store(ir.Constant(emit.F32, _MASKED), emit.at(b, self.tops, row))

  def weigh(self, row: Any, offset: Any, lines: Any) -> None:
    """Writes how a row's scores become weights, and its sums decay.

    Args:
      row: the row.
      offset: position of the first key.
      lines: of scores.
    """
    b = self.b
    _, position = self.place(row)
    end = b.sub(b.add(position, int64(1)), offset)
    low = b.sub(end, self.window)
    end, low = (
      emit.splat(b, b.trunc(bound, emit.I32), COLUMNS) for bound in (end, low)
    )

    def seen(i: Any) -> Any:
      first = b.trunc(b.mul(i, int64(COLUMNS)), emit.I32)
      at = b.add(emit.splat(b, first, COLUMNS), _COUNT)
      return b.and_(b.icmp_signed('<', at, end), b.icmp_signed('>=', at, low))

    def score_at(i: Any) -> Any:
      return _line(b, self.scores, b.mul(row, self.work.page_size), i)

    def mask(i: Any, carried: list[Any]) -> list[Any]:
      line = b.select(seen(i), _load(b, score_at(i)), masked)
      _store(b, line, score_at(i))
      return [functions.most(b, carried[0], line)]

    def weight(i: Any, carried: list[Any]) -> list[Any]:
      line = functions.exp(b, b.fsub(_load(b, score_at(i)), top))
      line = b.select(seen(i), line, _ZEROS)
      _store(b, line, score_at(i))
      return [b.fadd(carried[0], line)]

    def decayed(i: Any) -> None:
      address = _line(b, self.mixed, b.mul(row, self.work.head_dim), i)
      _store(b, b.fmul(_load(b, address), decay), address)

    is_capped = b.icmp_signed(
      '!=', int_at(b, self.work.ints, int64(2)), int64(0)
    )
    with b.if_then(is_capped):
      _each(b, lines, lambda i: self._cap(score_at(i)))
    masked = functions.constant(_ZEROS, _MASKED)
    (highest,) = emit.loop(b, lines, mask, [masked])
    old = b.load(emit.at(b, self.tops, row), typ=emit.F32)
    top = functions.highest(b, highest)
    top = b.select(b.fcmp_ordered('>', top, old), top, old)
    b.store(top, emit.at(b, self.tops, row))
    top, old = (emit.splat(b, x, COLUMNS) for x in (top, old))
    decay = functions.exp(b, b.fsub(old, top))
    norm = _line(b, self.norms, int64(0), row)
    (total,) = emit.loop(b, lines, weight, [b.fmul(_load(b, norm), decay)])
    _store(b, total, norm)
    _each(b, self.lines_of_head, decayed)

  def end(self, row: Any) -> None:
    """Writes the row's output: what was mixed, by the sum of its weights."""
    b = self.b
    where, _ = self.place(row)
    norm = _load(b, _line(b, self.norms, int64(0), row))
    total = emit.splat(b, functions.total(b, norm), COLUMNS)
    query = b.srem(b.sdiv(where, self.work.head_dim), self.work.num_heads)
    sink = b.load(emit.at(b, self.work.sinks, query), typ=emit.F32)
    top = b.load(emit.at(b, self.tops, row), typ=emit.F32)
    sink = functions.exp(b, emit.splat(b, b.fsub(sink, top), COLUMNS))
    has_sinks = b.icmp_signed(
      '!=', int_at(b, self.work.ints, int64(1)), int64(0)
    )
    total = b.select(has_sinks, b.fadd(total, sink), total)

    def line(i: Any) -> None:
      given = _line(b, self.mixed, b.mul(row, self.work.head_dim), i)
      to = _line(b, self.work.out, where, i)
      _store(b, b.fdiv(_load(b, given), total), to)

    _each(b, self.lines_of_head, line)

  def _cap(self, address: Any) -> None:
    b = self.b
    cap = b.load(emit.at(b, self.work.floats, int64(1)), typ=emit.F32)
    most = emit.splat(b, cap, COLUMNS)
    ratio = b.fdiv(_load(b, address), most)
    _store(b, b.fmul(most, functions.tanh(b, ratio)), address)


def _each(b: ir.IRBuilder, count: Any, write: Callable[[Any], None]) -> None:
  """Writes a loop that carries nothing."""

  def body(i: Any, carried: list[Any]) -> list[Any]:
    write(i)
    return carried

  emit.loop(b, count, body)


def _line(b: ir.IRBuilder, base: Any, start: Any, number: Any) -> Any:
  """Returns the address of a line of float32s that begin at base[start]."""
  return emit.at(b, emit.at(b, base, start), number, LINE)


def int_at(
  b: ir.IRBuilder, base: Any, index: Any, dtype: Any = emit.I32
) -> Any:
  """Returns a number of an array of integers, as an int64."""
  value = b.load(emit.at(b, base, index, dtype), typ=dtype)
  return value if dtype is emit.I64 else b.sext(value, emit.I64)


def _load(b: ir.IRBuilder, address: Any) -> Any:
  return b.load(address, align=4, typ=LINE)


def _store(b: ir.IRBuilder, line: Any, address: Any) -> None:
  b.store(line, address, align=4)


def lesser(b: ir.IRBuilder, x: Any, y: Any) -> Any:
  """Returns the lesser of two int64s."""
  return b.select(b.icmp_signed('<', x, y), x, y)


def positive(b: ir.IRBuilder, x: Any) -> Any:
  """Returns an int64, or 0 where it is less."""
  return b.select(b.icmp_signed('>', x, int64(0)), x, int64(0))
