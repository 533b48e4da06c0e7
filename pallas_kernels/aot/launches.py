# SPDX-License-Identifier: Apache-2.0
"""Reads from a program's text what it launches, and the bytes of each launch.

Bytes are of the GPU's memory, as if each launch read its inputs once and wrote
its outputs: what the L2 cache keeps from one to the next is not known.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
import dataclasses
import re

from pallas_kernels.aot import hlo_types

_COMPUTATION = re.compile(r'^(ENTRY )?%?(\S+) \(.*\{$')
_TYPE = r'\((?:[^()]|\([^()]*\))*\)|\S+'
_INSTRUCTION = re.compile(
  rf'^\s+(ROOT )?%(\S+) = ({_TYPE}) ([a-z][a-z0-9-]*)\((.*?)\)(.*)$'
)
# What the device does nothing for, beside the ends of what is asynchronous.
_FREE = {'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast'}
# What reads only as much of its first operand as its result is large.
_PARTS = {'slice', 'dynamic-slice', 'gather'}
# What writes into its first operand -> which operand it writes.
_UPDATES = {'dynamic-update-slice': 1, 'scatter': 2}


@dataclasses.dataclass(frozen=True, slots=True)
class Launch:
  """A kernel, or something else that a program has the device do.

  Attributes:
    name: a Pallas kernel's own, or what XLA calls it.
    result: type of the (first) result.
    parameters: parameter of the program -> bytes that are read of it.
    needs: places of launches that must have ended before, directly or not.
    read, written: bytes.
  """

  name: str
  result: str
  parameters: Mapping[str, int]
  needs: frozenset[int]
  read: int
  written: int


@dataclasses.dataclass(frozen=True, slots=True)
class _Instruction:
  """A line of a program; of a parameter, `attributes` are its number."""

  name: str
  result: str
  opcode: str
  operands: tuple[str, ...]
  attributes: str
  is_root: bool

  @property
  def num_bytes(self) -> int:
    return sum(hlo_types.array_bytes(self.result))

  @property
  def is_free(self) -> bool:
    return self.opcode in _FREE or self.opcode.endswith('-done')

  @property
  def pallas_name(self) -> str | None:
    found = re.search(r'op_name="[^"]*?(\w+)/pallas_call', self.attributes)
    return found[1] if found and self.opcode == 'custom-call' else None


_Computation = dict[str, _Instruction]


def read(
  hlo: str, uncounted: Collection[str] = (), merges: Collection[str] = ()
) -> list[Launch]:
  """Returns the launches of a program, in their order.

  A branch or a loop is one launch, whose bytes are not counted. Of a Pallas
  kernel neither are arrays of the types that are named, nor partial results,
  nor what these are merged into, as it is read: how much of them depends on
  more than the program.

  Args:
    hlo: the optimized program, as of `compiled.as_text()`.
    uncounted: types as in 'bf16[8,128]', above all of the KV cache.
    merges: Pallas kernels; a result that only these read is partial.
  """
  computations, entry = _parse(hlo)
  places: dict[str, int] = {}  # of instructions that are launches
  needs: dict[str, frozenset[int]] = {}  # of all
  launches: list[Launch] = []
  for one in entry.values():
    needs[one.name] = frozenset().union(
      *(needs[name] for name in one.operands),
      *([places[name]] for name in one.operands if name in places),
    )
    if one.is_free:
      continue
    reads = dict(_reads(one, entry, computations, uncounted, merges))
    places[one.name] = len(launches)
    launches.append(
      Launch(
        one.pallas_name or one.name,
        one.result.strip('(').partition('{')[0],
        {
          name: size
          for name, size in reads.items()
          if entry[name].opcode == 'parameter'
        },
        needs[one.name],
        sum(reads.values()),
        _written(one, entry, computations, uncounted, merges),
      )
    )
  return launches


def _parse(hlo: str) -> tuple[dict[str, _Computation], _Computation]:
  """Returns name -> computation, and the one that is the program."""
  computations: dict[str, _Computation] = {}
  entry: _Computation = {}
  into: _Computation = {}
  for line in hlo.splitlines():
    if begin := _COMPUTATION.match(line):
      into = computations[begin[2]] = {}
      entry = into if begin[1] else entry
    elif found := _INSTRUCTION.match(line):
      root, name, result, opcode, operands, attributes = found.groups()
      into[name] = _Instruction(
        name,
        result,
        opcode,
        tuple(re.findall(r'%([^\s,()]+)', operands)),
        operands if opcode == 'parameter' else attributes,
        bool(root),
      )
  return computations, entry


def _called(
  one: _Instruction, computations: dict[str, _Computation]
) -> _Computation | None:
  """Returns what a fusion computes; None for what is none."""
  found = re.search(r'\bcalls=%?([^\s,]+)', one.attributes)
  return computations[found[1]] if found and one.opcode == 'fusion' else None


def _source(name: str, among: _Computation) -> _Instruction:
  """Returns what makes an array that may be seen in other shapes."""
  one = among[name]
  while one.opcode in ('bitcast', 'get-tuple-element'):
    one = among[one.operands[0]]
  return one


def _reads(
  one: _Instruction,
  entry: _Computation,
  computations: dict[str, _Computation],
  uncounted: Collection[str],
  merges: Collection[str],
) -> Iterator[tuple[str, int]]:
  """Yields what a launch reads, and how many bytes of it."""
  if one.opcode in ('conditional', 'while', 'call'):
    return
  fused = _called(one, computations)
  total: dict[str, int] = {}
  for place, name in enumerate(one.operands):
    source = _source(name, entry)
    size = entry[name].num_bytes
    if one.pallas_name:
      is_partial = one.pallas_name in merges and source.pallas_name is not None
      size *= not is_partial and not _is_named(entry[name], uncounted)
    elif fused is not None:
      size = _read_of_parameter(place, fused, size)
    total[source.name] = total.get(source.name, 0) + size
  yield from total.items()


def _written(
  one: _Instruction,
  entry: _Computation,
  computations: dict[str, _Computation],
  uncounted: Collection[str],
  merges: Collection[str],
) -> int:
  """Returns the bytes that a launch writes."""
  if one.opcode in ('conditional', 'while', 'call'):
    return 0
  fused = _called(one, computations)
  if fused is not None:
    (root,) = (line for line in fused.values() if line.is_root)
    root = _source(root.name, fused)
    made = root.operands if root.opcode == 'tuple' else (root.name,)
    return sum(_updated(_source(name, fused), fused) for name in made)
  if not one.pallas_name:
    return one.num_bytes
  return sum(
    sum(hlo_types.array_bytes(array))
    for place, array in enumerate(re.findall(r'\w+\[[\d,]*\]', one.result))
    if array not in uncounted
    and (place in _aliased(one) or not _is_partial(one, place, entry, merges))
  )


def _is_partial(
  one: _Instruction, place: int, entry: _Computation, merges: Collection[str]
) -> bool:
  """Tells whether a result is only for kernels that merge it."""
  names = {
    line.name
    for line in entry.values()
    if line.opcode == 'get-tuple-element'
    and line.operands == (one.name,)
    and re.search(rf'\bindex={place}\b', line.attributes)
  }
  readers = [
    line.pallas_name in merges and at not in _aliased(line).values()
    for line in entry.values()
    for at, name in enumerate(line.operands)
    if name in names
  ]
  return bool(readers) and all(readers)


def _updated(one: _Instruction, among: _Computation) -> int:
  if one.opcode in _UPDATES:
    return among[one.operands[_UPDATES[one.opcode]]].num_bytes
  return one.num_bytes


def _read_of_parameter(place: int, fused: _Computation, size: int) -> int:
  """Returns the bytes that a fusion reads of a parameter of that size."""
  read = 0
  for user in fused.values():
    if user.opcode == 'bitcast':
      continue
    for at, name in enumerate(user.operands):
      source = _source(name, fused)
      if (source.opcode, source.attributes) != ('parameter', str(place)):
        continue
      if at == 0 and user.opcode in _PARTS:
        read += user.num_bytes
      elif at > 0 or user.opcode not in _UPDATES:
        return size
  return min(read, size)


def _aliased(one: _Instruction) -> dict[int, int]:
  """Returns result -> operand that it takes the memory of."""
  _, _, text = one.attributes.partition('output_to_operand_aliasing={')
  text = text.partition('}}')[0]
  return {
    int(result or 0): int(operand)
    for result, operand in re.findall(r'\{(\d*)\}: \((\d+),', text)
  }


def _is_named(one: _Instruction, types: Collection[str]) -> bool:
  return one.result.partition('{')[0] in types
