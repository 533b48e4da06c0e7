# SPDX-License-Identifier: Apache-2.0
"""Sorts rows by the groups that they belong to."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import devices
from pallas_kernels.grouped_matmul import grouping_triton


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
  sort = sort_by_xla
  if devices.default().platform != 'cpu':
    with contextlib.suppress(NotImplementedError):
      devices.check_triton(devices.default())
      sort = grouping_triton.sort
  return Groups(*sort(keys, num_groups))


def sort_by_xla(
  keys: jax.Array, num_groups: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Does it in JAX's own operations."""
  rows = jnp.arange(keys.shape[0], dtype=jnp.int32)
  _, order = jax.lax.sort((keys, rows), num_keys=1, is_stable=True)
  places = jnp.zeros_like(rows).at[order].set(rows, unique_indices=True)
  is_in = keys[:, None] == jnp.arange(num_groups, dtype=jnp.int32)[None, :]
  return is_in.sum(0, dtype=jnp.int32), order, places
