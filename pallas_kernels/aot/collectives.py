# SPDX-License-Identifier: Apache-2.0
"""Counts what a compiled program sends between devices, from its text."""

from __future__ import annotations

from collections import Counter
import dataclasses
import re

from pallas_kernels.aot import hlo_types

_KINDS = (
  'all-reduce',
  'all-gather',
  'reduce-scatter',
  'all-to-all',
  'collective-permute',
)
_CALL = re.compile(
  rf'^\s*(?:ROOT )?\S+ = (.+?) ({"|".join(_KINDS)})(-start)?\(', re.M
)


@dataclasses.dataclass(frozen=True, slots=True)
class Collective:
  """All calls of one kind.

  Attributes:
    kind: such as 'all-reduce'.
    count: calls in one run of the program.
    num_bytes: bytes of all their results on one device.
  """

  kind: str
  count: int
  num_bytes: int


def read(hlo: str) -> list[Collective]:
  """Reads the collectives of a program from `compiled.as_text()`."""
  counts: Counter[str] = Counter()
  sizes: Counter[str] = Counter()
  for result, kind, start in _CALL.findall(hlo):
    arrays = hlo_types.array_bytes(result)
    # An asynchronous one lists its input, its output, and more.
    if start and kind != 'all-reduce':
      arrays = arrays[:2][-1:]
    counts[kind] += 1
    sizes[kind] += sum(arrays)
  return [
    Collective(kind, counts[kind], sizes[kind])
    for kind in _KINDS
    if counts[kind]
  ]
