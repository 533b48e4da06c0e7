# SPDX-License-Identifier: Apache-2.0
"""Shares work among the threads that XLA computes with.

A task takes one piece after the other, as does who asks, until none is left.
Nobody waits for a task that has not begun, since all threads may wait thus. So
what tasks look at outlives the call: whoever comes last frees it.

Who asks waits for the last pieces: at first by looking again and again, as most
are done in less time than it takes to wake up; then asleep. Another program, or
our own host code, may have the core of the thread that it waits for, and can
use this one instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import platform
from typing import Any

from llvmlite import ir

from pallas_kernels.llvm import calls
from pallas_kernels.llvm import emit
from pallas_kernels.llvm.emit import int64

# Bytes from the beginning of XLA_FFI_Api.
_SCHEDULE, _NUM_THREADS = 136, 144
# What tasks look at, int64s: the next piece, how many are done, who holds it,
# how many pieces there are, and a semaphore that tells that all are done, which
# POSIX's libraries have in 32 bytes at most; then the work's own.
_NEXT, _DONE, _HOLDERS, _PIECES, _ALL_DONE, _WORK = 0, 1, 2, 3, 4, 8
# How often to look before falling asleep: 60 us on Zen 5.
_LOOKS = 2500
# What takes a while and leaves the core to others that share it, by machine.
_PAUSES: Mapping[str, tuple[str, Sequence[Any]]] = {
  'x86_64': ('llvm.x86.sse2.pause', ()),
  'aarch64': ('llvm.aarch64.isb', (ir.Constant(emit.I32, 15),)),
}


def number_of(b: ir.IRBuilder, frame: calls.Frame, num_devices: int) -> Any:
  """Returns how many threads a device has; 1 where XLA has none to lend."""
  number = emit.local(b, 1)
  b.store(int64(1), number)
  _call(b, frame, _NUM_THREADS, _arguments(b, frame, number))
  threads = b.sdiv(b.load(number, typ=emit.I64), int64(num_devices))
  return b.select(b.icmp_signed('>', threads, int64(1)), threads, int64(1))


def write_sharing(
  module: ir.Module,
  piece: Callable[[ir.IRBuilder, Any, list[Any]], None],
  types: Sequence[Any],
) -> Callable[[ir.IRBuilder, calls.Frame, Any, Any, Sequence[Any]], None]:
  """Writes what computes pieces, here and as a task.

  Args:
    module: where to.
    piece: writes what computes a piece, by its number and the work's values.
    types: of these, of 8 bytes each.

  Returns:
    `share(b, frame, threads, pieces, values)`: writes a call of it, by at most
    so many threads.
  """
  run = _write_run(module, piece, types)
  task, release = _write_task(module, run)
  size = 8 * (_WORK + len(types))

  def share(
    b: ir.IRBuilder,
    frame: calls.Frame,
    threads: Any,
    pieces: Any,
    values: Sequence[Any],
  ) -> None:
    one = int64(1)
    most = b.select(b.icmp_signed('>', pieces, one), pieces, one)
    threads = b.select(b.icmp_signed('<', most, threads), most, threads)
    malloc = emit.external(module, 'malloc', emit.I64, result=emit.POINTER)
    work = b.call(malloc, [int64(size)])
    for number, value in enumerate((int64(0), int64(0), threads, pieces)):
      b.store(value, _field(b, work, number))
    for number, value in enumerate(values, _WORK):
      b.store(value, _field(b, work, number))
    _semaphore(b, 'init', work, *[ir.Constant(emit.I32, 0)] * 2)
    arguments = _arguments(b, frame, task, work)

    def ask(_: Any, carried: list[Any]) -> list[Any]:
      _call(b, frame, _SCHEDULE, arguments)
      return carried

    emit.loop(b, b.sub(threads, one), ask)
    b.call(run, [work])
    _wait(b, work, pieces)
    b.call(release, [work])

  return share


def _write_run(
  module: ir.Module,
  piece: Callable[[ir.IRBuilder, Any, list[Any]], None],
  types: Sequence[Any],
) -> ir.Function:
  fn, b = emit.function(module, 'run', emit.POINTER)
  (work,) = fn.args
  pieces = b.load(_field(b, work, _PIECES), typ=emit.I64)
  values = [
    b.load(_field(b, work, i), typ=dtype)
    for i, dtype in enumerate(types, _WORK)
  ]
  turn, compute, end = (
    b.append_basic_block(label) for label in ('turn', 'compute', 'end')
  )
  b.branch(turn)
  b.position_at_end(turn)
  number = b.atomic_rmw('add', _field(b, work, _NEXT), int64(1), 'monotonic')
  b.cbranch(b.icmp_signed('<', number, pieces), compute, end)
  b.position_at_end(compute)
  piece(b, number, values)
  before = b.atomic_rmw('add', _field(b, work, _DONE), int64(1), 'release')
  is_last = b.icmp_signed('==', b.add(before, int64(1)), pieces)
  with b.if_then(is_last):
    _semaphore(b, 'post', work)
  b.branch(turn)
  b.position_at_end(end)
  b.ret_void()
  return fn


def _write_task(
  module: ir.Module, run: ir.Function
) -> tuple[ir.Function, ir.Function]:
  """Returns the task, and what gives back what it looks at."""
  release, b = emit.function(module, 'release', emit.POINTER)
  (work,) = release.args
  holders = b.atomic_rmw('sub', _field(b, work, _HOLDERS), int64(1), 'acq_rel')
  with b.if_then(b.icmp_signed('==', holders, int64(1))):
    b.call(emit.external(module, 'free', emit.POINTER), [work])
  b.ret_void()
  task, b = emit.function(module, 'task', emit.POINTER)
  b.call(run, task.args)
  b.call(release, task.args)
  b.ret_void()
  return task, release


def _wait(b: ir.IRBuilder, work: Any, pieces: Any) -> None:
  """Writes a loop until all pieces are done."""
  before = b.block
  look, again, sleep, after = (
    b.append_basic_block(label) for label in ('look', 'again', 'sleep', 'done')
  )
  b.branch(look)
  b.position_at_end(look)
  looks = b.phi(emit.I64)
  done = b.load_atomic(_field(b, work, _DONE), 'acquire', align=8, typ=emit.I64)
  b.cbranch(b.icmp_signed('<', done, pieces), again, after)
  b.position_at_end(again)
  if pause := _PAUSES.get(platform.machine()):
    name, arguments = pause
    types = [argument.type for argument in arguments]
    b.call(emit.external(b.module, name, *types), arguments)
  more = b.add(looks, int64(1))
  b.cbranch(b.icmp_signed('<', more, int64(_LOOKS)), look, sleep)
  b.position_at_end(sleep)
  # Signals end it early, and where there are no semaphores it returns at once.
  _semaphore(b, 'wait', work)
  b.branch(look)
  for looked, block in ((int64(0), before), (more, again), (more, sleep)):
    looks.add_incoming(looked, block)
  b.position_at_end(after)


def _semaphore(b: ir.IRBuilder, what: str, work: Any, *arguments: Any) -> None:
  """Writes a call of one of the functions of POSIX's semaphores."""
  types = [emit.POINTER, *(argument.type for argument in arguments)]
  function = emit.external(b.module, f'sem_{what}', *types, result=emit.I32)
  b.call(function, [_field(b, work, _ALL_DONE), *arguments])


def _arguments(b: ir.IRBuilder, frame: calls.Frame, *fields: Any) -> Any:
  """Returns a struct for a function of XLA's: its size, the context, these."""
  null = ir.Constant(emit.POINTER, None)
  size = int64(8 * (3 + len(fields)))
  struct = emit.local(b, 3 + len(fields))
  for number, value in enumerate((size, null, frame.context, *fields)):
    b.store(value, _field(b, struct, number))
  return struct


def _call(
  b: ir.IRBuilder, frame: calls.Frame, offset: int, arguments: Any
) -> None:
  """Calls a function of XLA's, by its place in XLA_FFI_Api.

  What it returns is no more than that there are no threads to ask.
  """
  signature = ir.FunctionType(emit.POINTER, [emit.POINTER])
  address = emit.at(b, frame.api, int64(offset), emit.I8)
  b.call(b.load(address, typ=signature.as_pointer()), [arguments])


def _field(b: ir.IRBuilder, work: Any, number: int) -> Any:
  return emit.at(b, work, int64(number), emit.I64)
