# SPDX-License-Identifier: Apache-2.0
"""Sorts rows by the groups that they belong to."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Groups(NamedTuple):
  """Rows, in the order of their groups.

  Attributes:
    sizes: [G] int32, the number of each group's rows.
    order: [R] int32, which of the rows comes at each place. Rows of no group
      come last.
    places: [R] int32, the place of each row.
  """

  sizes: jax.Array
  order: jax.Array
  places: jax.Array


def group(keys: jax.Array, num_groups: int) -> Groups:
  """Sorts rows by groups; those of a group keep their order.

  Worked example: keys=[1, 0, 3, 1], num_groups=3 -> sizes [1, 2, 0], order
  [1, 0, 3, 2], places [1, 0, 3, 2].

  Args:
    keys: [R] int32, each row's group; at least `num_groups`, which is G, where
      it belongs to none.
    num_groups: G.
  """
  (num_rows,) = keys.shape
  rows = jnp.arange(num_rows, dtype=jnp.int32)
  _, order = jax.lax.sort((keys, rows), num_keys=1, is_stable=True)
  places = jnp.zeros_like(rows).at[order].set(rows, unique_indices=True)
  is_in = keys[:, None] == jnp.arange(num_groups, dtype=jnp.int32)[None, :]
  return Groups(is_in.sum(0, dtype=jnp.int32), order, places)
