# SPDX-License-Identifier: Apache-2.0
"""Cuts groups of rows into work items, for the blocks of a GPU.

An item is a tile of rows, all of one group, and some columns of that group's
matrices. Items of a group that have the same columns follow one another, so
that all but the first find them in the cache.

Each block finds its own item in the groups' sizes: a launch that does it for
all would take longer. Items that nobody needs come last, and have no rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Item(NamedTuple):
  """A work item, of scalars, int32.

  Attributes:
    group: its rows' group.
    start, stop: its rows; the same where it has none.
    column: which of the group's columns, in [0, num_columns).
  """

  group: Any
  start: Any
  stop: Any
  column: Any


def most_tiles(num_rows: int, num_groups: int, tile_rows: int) -> int:
  """Returns the most tiles that groups can take, whatever their sizes."""
  groups = min(num_groups, num_rows)
  return groups + (num_rows - groups) // tile_rows


def item_of(
  i: Any, group_sizes: jax.Array, tile_rows: int, num_columns: int
) -> Item:
  """Returns the work item of a number in [0, most_tiles * num_columns).

  Worked example: group_sizes=[3, 0, 1], tile_rows=2, num_columns=2 -> of group
  0 rows [0, 2) and [2, 3) with column 0, then both with column 1; of group 2
  row [3, 4) with column 0, then with column 1.

  Args:
    i: the number, an int32 scalar.
    group_sizes: [G] int32; may have zeros behind.
    tile_rows: rows of a tile.
    num_columns: in how many parts each matrix's columns are cut.
  """
  tiles = -(-group_sizes // tile_rows)
  last, ends = jnp.cumsum(tiles), jnp.cumsum(group_sizes)
  # Sums of vectors are all that a block of a GPU has in place of indices.
  is_before = last * num_columns <= i
  group = is_before.sum(dtype=jnp.int32)
  is_it = jnp.arange(len(group_sizes), dtype=jnp.int32) == group

  def of_group(x: jax.Array) -> jax.Array:
    return jnp.where(is_it, x, 0).sum(dtype=jnp.int32)

  size, end, count = map(of_group, (group_sizes, ends, tiles))
  place = i - num_columns * jnp.where(is_before, tiles, 0).sum(dtype=jnp.int32)
  count = jnp.maximum(count, 1)  # Of no group, where there is no item left.
  start = end - size + tile_rows * (place % count)
  return Item(
    group,
    jnp.minimum(start, end),
    jnp.minimum(start + tile_rows, end),
    jnp.minimum(place // count, num_columns - 1),
  )
