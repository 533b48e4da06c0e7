# SPDX-License-Identifier: Apache-2.0
"""Cuts groups of rows into tiles, for the blocks of a GPU.

A tile is rows of one group, and is multiplied by that group's matrix, some
columns at a time. Tiles of a group take the same columns one after the other,
so that all but the first find them in the cache.

All arrays have fixed shapes, and all arithmetic is in whole arrays, so the same
code runs on the host (NumPy) and in a traced step (jax.numpy): `Any` is an
array, `xp` is NumPy or jax.numpy.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp


class Plan(NamedTuple):
  """Tiles, group after group; those that nobody needs are last, and empty.

  Attributes:
    groups: [M] int32, the group of each tile.
    starts: [M] int32, its first row.
    stops: [M] int32, the row after its last; its first one's where it is empty.
    firsts: [M] int32, the first tile of its group.
    counts: [M] int32, the number of tiles of its group.
  """

  groups: Any
  starts: Any
  stops: Any
  firsts: Any
  counts: Any

  def item(self, i: Any, num_columns: int) -> tuple[Any, Any]:
    """Returns the tile and the column of work item i, in [0, M * columns).

    Worked example, 2 columns, groups of 1 and of 2 tiles -> (0, 0), (0, 1),
    (1, 0), (2, 0), (1, 1), (2, 1).
    """
    any_tile = i // num_columns
    first, count = self.firsts[any_tile], self.counts[any_tile]
    place = i - first * num_columns
    return first + place % count, place // count


def most_tiles(num_rows: int, num_groups: int, tile_rows: int) -> int:
  """Returns M, the most tiles that groups can take, whatever their sizes."""
  groups = min(num_groups, num_rows)
  return groups + (num_rows - groups) // tile_rows


def make_plan(
  group_sizes: Any, num_rows: int, tile_rows: int, xp: Any = jnp
) -> Plan:
  """Cuts each group into as few tiles as it takes.

  Worked example: group_sizes=[3, 0, 1], num_rows=5, tile_rows=2 -> groups
  [0, 0, 2, 2], starts [0, 2, 3, 4], stops [2, 3, 4, 4], firsts [0, 0, 2, 3],
  counts [2, 2, 1, 1].

  Args:
    group_sizes: [G] int32.
    num_rows: R, at least the sum of the sizes.
    tile_rows: rows of a tile.
    xp: the arrays' module.
  """
  (num_groups,) = group_sizes.shape
  tiles = -(-group_sizes // tile_rows)
  last, ends = (xp.cumsum(x, dtype=xp.int32) for x in (tiles, group_sizes))
  tile = xp.arange(most_tiles(num_rows, num_groups, tile_rows), dtype=xp.int32)
  group = (last[None, :] <= tile[:, None]).sum(1, dtype=xp.int32)
  is_used = group < num_groups
  group = xp.minimum(group, num_groups - 1)
  end, first = ends[group], last[group] - tiles[group]
  # Those beyond all groups begin where the last group ends.
  start = end - group_sizes[group] + tile_rows * (tile - first)
  start = xp.minimum(start, end)
  return Plan(
    group,
    start,
    xp.minimum(start + tile_rows, end),
    xp.where(is_used, first, tile),
    xp.where(is_used, tiles[group], 1),
  )
