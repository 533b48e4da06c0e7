# SPDX-License-Identifier: Apache-2.0
"""Tells what a compiled step launches for a layer, and the bytes of it."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
from typing import Any

import rich.box
import rich.table

from pallas_kernels.aot import launches as launches_lib

# Kernels of attention; a layer launches some of them, in this order.
_ATTENTION = 'attend_small', 'merge_splits', 'attend_chunks'


@dataclasses.dataclass(frozen=True, slots=True)
class Layer:
  """What a layer launches, from behind one attention to behind the next.

  Attributes:
    launches: in their order.
  """

  launches: Sequence[launches_lib.Launch]

  @property
  def num_bytes(self) -> int:
    """Bytes that are read and written, without the KV cache."""
    return sum(one.read + one.written for one in self.launches)

  @property
  def least_bytes(self) -> int:
    """Bytes of the weights, which have to be read once."""
    weights: dict[str, int] = {}
    for one in self.launches:
      for name, size in one.parameters.items():
        weights[name] = max(size, weights.get(name, 0))
    return sum(weights.values())

  def as_dict(self) -> dict[str, Any]:
    """Returns the layer for JSON."""
    return {
      'bytes': self.num_bytes,
      'least_bytes': self.least_bytes,
      'launches': [
        {
          key: getattr(one, key)
          for key in ('name', 'result', 'read', 'written')
        }
        for one in self.launches
      ],
    }

  def table(self) -> rich.table.Table:
    """Returns a table that people read."""
    table = rich.table.Table(
      'a layer launches',
      caption='Bytes as if each launch read its inputs once, and wrote its '
      'outputs, without the KV cache, which is read by the length of contexts. '
      'XLA chooses other kernels for products where it can time them.',
      box=rich.box.SIMPLE_HEAD,
    )
    table.add_column('')
    for column in ('MB read', 'written'):
      table.add_column(column, justify='right')
    for one in self.launches:
      table.add_row(one.name, one.result, _mb(one.read), _mb(one.written))
    table.add_section()
    table.add_row(
      f'{len(self.launches)} launches',
      f'{self.num_bytes / self.least_bytes:.3f} of the weights',
      _mb(sum(one.read for one in self.launches)),
      _mb(sum(one.written for one in self.launches)),
    )
    table.add_row('weights', '', _mb(self.least_bytes), '')
    return table


def read(hlo: str, kv_types: set[str]) -> Layer | None:
  """Finds the second layer of a step.

  Where there are more, it is one like most: the first plans what all use, and
  the last one computes only what is sampled from.

  Args:
    hlo: the step's optimized program.
    kv_types: of the cache's arrays, as in 'bf16[8,128]'.

  Returns:
    None where there are no two layers with our attention.
  """
  launches = launches_lib.read(hlo, kv_types)
  ends: list[int] = []  # the last launch of each layer's attention
  for place, one in enumerate(launches):
    if one.name in _ATTENTION:
      last = launches[ends[-1]].name if ends else None
      if last and _ATTENTION.index(last) < _ATTENTION.index(one.name):
        ends[-1] = place
      else:
        ends.append(place)
  if len(ends) < 2:
    return None
  before, behind = ({*launches[end].needs, end} for end in ends[:2])
  return Layer([launches[place] for place in sorted(behind - before)])


def _mb(num_bytes: int) -> str:
  return f'{num_bytes / 1e6:,.2f}'
