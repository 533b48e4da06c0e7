# SPDX-License-Identifier: Apache-2.0
"""Tells what a compiled step launches for a layer, and the bytes of it."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import itertools
import statistics
from typing import Any

import rich.box
import rich.table

from pallas_kernels.aot import launches as launches_lib

# Kernels of attention; a layer launches some of them, in this order.
_ATTENTION = 'attend_small', 'merge_splits', 'attend_chunks'
_MERGES = {'merge_splits'}


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
      'num_launches': len(self.launches),
      'launches': [
        {
          key: getattr(one, key)
          for key in ('name', 'result', 'read', 'written')
        }
        for one in self.launches
      ],
    }


def read(hlo: str, kv_types: set[str]) -> list[Layer]:
  """Finds the layers of a step, from the second on.

  The first is left out, as it has what is done once for all. The last computes
  only what is sampled from. The others may differ, too, where XLA has additions
  of several layers in one kernel.

  Args:
    hlo: the step's optimized program.
    kv_types: of the cache's arrays, as in 'bf16[8,128]'.
  """
  launches = launches_lib.read(hlo, kv_types, _MERGES)
  ends: list[int] = []  # the last launch of each layer's attention
  for place, one in enumerate(launches):
    if one.name in _ATTENTION:
      last = launches[ends[-1]].name if ends else None
      if last and _ATTENTION.index(last) < _ATTENTION.index(one.name):
        ends[-1] = place
      else:
        ends.append(place)
  before = [{*launches[end].needs, end} for end in ends]
  return [
    Layer([launches[place] for place in sorted(behind - ahead)])
    for ahead, behind in itertools.pairwise(before)
  ]


def table(layers: Sequence[Layer]) -> rich.table.Table:
  """Returns a table of the first of these layers, for people.

  Args:
    layers: one at least.
  """
  layer = layers[0]
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
  for one in layer.launches:
    table.add_row(one.name, one.result, _mb(one.read), _mb(one.written))
  table.add_section()
  table.add_row(
    f'{len(layer.launches)} launches',
    f'{layer.num_bytes / layer.least_bytes:.3f} of the weights',
    _mb(sum(one.read for one in layer.launches)),
    _mb(sum(one.written for one in layer.launches)),
  )
  table.add_row('weights', '', _mb(layer.least_bytes), '')
  mean = statistics.fmean(len(each.launches) for each in layers)
  table.add_row('launches, on average', f'{mean:.1f}', '', '')
  return table


def _mb(num_bytes: int) -> str:
  return f'{num_bytes / 1e6:,.2f}'
