# SPDX-License-Identifier: Apache-2.0
"""Cuts groups of rows into tiles, for the blocks of a GPU.

A tile is rows of one group. All arrays have fixed shapes, and all arithmetic is
in whole arrays, so the same code runs on the host (NumPy) and in a traced step
(jax.numpy): `Any` is an array, `xp` is NumPy or jax.numpy.
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
  """

  groups: Any
  starts: Any
  stops: Any


def most_tiles(num_rows: int, num_groups: int, tile_rows: int) -> int:
  """Returns M, the most tiles that groups can take, whatever their sizes."""
  groups = min(num_groups, num_rows)
  return groups + (num_rows - groups) // tile_rows


def make_plan(
  group_sizes: Any, num_rows: int, tile_rows: int, xp: Any = jnp
) -> Plan:
  """Cuts each group into as few tiles as it takes.

  Worked example: group_sizes=[3, 0, 1], num_rows=5, tile_rows=2 -> groups
  [0, 0, 2, 2], starts [0, 2, 3, 4], stops [2, 3, 4, 4].

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
  # Tiles beyond all groups begin where the last group ends.
  of = xp.minimum(group, num_groups - 1)
  start = ends[of] - group_sizes[of] + tile_rows * (tile - last[of] + tiles[of])
  start = xp.minimum(start, ends[of])
  return Plan(of, start, xp.minimum(start + tile_rows, ends[of]))
