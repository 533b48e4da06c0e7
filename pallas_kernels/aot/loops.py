# SPDX-License-Identifier: Apache-2.0
"""Finds inner loops in a kernel's machine code (SASS), and counts in them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
import dataclasses
import re

_LABEL = re.compile(r'^(\.L\w*):')
_INSTRUCTION = re.compile(
  r'^\s*/\*[0-9a-f]+\*/\s+(?:@\S+\s+)?([A-Z]\S*?)(?:\s+(.*?))?\s*;'
)
# The products of a warp, as the first suffix names them: rows, columns, depth.
_HMMA = {'1688': 16 * 8 * 8, '16816': 16 * 8 * 16}
_WARPS = 4  # that share a HGMMA, or a QGMMA
_WIDTHS = {'128': 128, '64': 64, 'U16': 16, 'S16': 16, 'U8': 8, 'S8': 8}


@dataclasses.dataclass(frozen=True, slots=True)
class Loop:
  """What a warp does in one turn of an inner loop.

  Attributes:
    instructions: all of them, also those that a predicate turns off.
    matrix: those that multiply matrices, such as HMMA and HGMMA.
    flops: operations of these; half of those of 8 bits (QGMMA), which take half
      of the time.
    loads: (bits of a thread, number) of those that load from global memory,
      the widest first.
    waits: of each wait for asynchronous loads, how many groups of them may
      still be under way: 0 where the loop is no pipeline.
  """

  instructions: int
  matrix: int
  flops: int
  loads: tuple[tuple[int, int], ...]
  waits: tuple[int, ...]


def parse(sass: str) -> list[Loop]:
  """Returns the inner loops of a kernel, in the order of their code.

  A loop is what lies between a branch and where it leads back to. An inner one
  has no other in it.

  Args:
    sass: its code, as nvdisasm prints it.
  """
  code: list[tuple[str, str]] = []  # opcode, operands
  places: dict[str, int] = {}
  for line in sass.splitlines():
    if label := _LABEL.match(line):
      places[label[1]] = len(code)
    elif found := _INSTRUCTION.match(line):
      code.append((found[1], found[2] or ''))
  ends = dict(_branches_back(code, places))
  return [
    _count(code[first : last + 1])
    for first, last in sorted(ends.items())
    if not any(
      first <= other <= end <= last
      for other, end in ends.items()
      if other != first
    )
  ]


def _branches_back(
  code: list[tuple[str, str]], places: dict[str, int]
) -> Iterator[tuple[int, int]]:
  """Yields where loops begin and end; of one with several ends the last."""
  for place, (opcode, operands) in enumerate(code):
    # BRA.DIV is for warps whose threads have parted, and leaves the loop.
    if _kind(opcode) == 'BRA' and '.DIV' not in opcode:
      target = re.search(r'`\((\.L\w+)\)', operands)
      # What branches to itself is a trap behind the code.
      if target and places.get(target[1], place) < place:
        yield places[target[1]], place


def _count(code: list[tuple[str, str]]) -> Loop:
  matrix = [opcode for opcode, _ in code if _kind(opcode).endswith('MMA')]
  loads = Counter(
    next((_WIDTHS[p] for p in opcode.split('.') if p in _WIDTHS), 32)
    for opcode, _ in code
    if _kind(opcode) in ('LDG', 'LDGSTS')
  )
  waits = (
    re.match(r'SB\d+, 0x([0-9a-f]+)', operands)
    for opcode, operands in code
    if opcode == 'DEPBAR.LE'
  )
  return Loop(
    len(code),
    len(matrix),
    sum(map(_flops, matrix)),
    tuple(sorted(loads.items(), reverse=True)),
    tuple(int(wait[1], 16) for wait in waits if wait),
  )


def _kind(opcode: str) -> str:
  return opcode.partition('.')[0]


def _flops(opcode: str) -> int:
  """Returns a warp's operations; of HGMMA its part."""
  shape = opcode.split('.')[1]
  if _kind(opcode) == 'HMMA':
    return 2 * _HMMA[shape]
  rows, columns, depth = map(int, shape.split('x'))
  flops = 2 * rows * columns * depth // _WARPS
  return flops // 2 if _kind(opcode) == 'QGMMA' else flops
