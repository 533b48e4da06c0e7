# SPDX-License-Identifier: Apache-2.0
"""Sorts rows by their groups in one launch: Pallas, lowered to Triton.

A block of the GPU takes some rows, and counts for each those that come before
it; or some groups, and counts their rows. XLA would sort by several launches,
and for the counts write down all that it compares.

On CPUs it runs in Pallas's interpreter, for tests.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
import jax.numpy as jnp

from pallas_kernels import devices

_MINE = 32  # rows, or groups, of a block
_AT_ONCE = 128  # rows that these are compared with at a time
_NUM_WARPS = 4


def sort(
  keys: jax.Array, num_groups: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns sizes, order and places; see `grouping.group`.

  Raises:
    NotImplementedError: the kernel can't run on the default device.
  """
  devices.check_triton(devices.default())
  launch = functools.partial(_launch, num_groups=num_groups)
  return devices.launch(launch, keys)


def _launch(
  keys: jax.Array, *, num_groups: int, interpret: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
  (num_rows,) = keys.shape
  of_rows = jax.ShapeDtypeStruct((num_rows,), jnp.int32)
  sizes, order, places = pl.pallas_call(
    functools.partial(_kernel, num_rows=num_rows, num_groups=num_groups),
    grid=(pl.cdiv(num_rows, _MINE) + pl.cdiv(num_groups, _MINE),),
    out_shape=(
      jax.ShapeDtypeStruct((num_groups,), jnp.int32),
      of_rows,
      of_rows,
    ),
    compiler_params=plgpu.CompilerParams(num_warps=_NUM_WARPS, num_stages=1),
    interpret=interpret,
    name='group_rows',
  )(keys)
  return sizes, order, places


def _kernel(
  keys_ref: Any,
  sizes_ref: Any,
  order_ref: Any,
  places_ref: Any,
  *,
  num_rows: int,
  num_groups: int,
) -> None:
  """Finds the places of some rows, or the sizes of some groups.

  Args:
    keys_ref: [R] int32.
    sizes_ref: [G] int32.
    order_ref, places_ref: [R] int32.
    num_rows, num_groups: R, G.
  """
  block = pl.program_id(0)
  row_blocks = pl.cdiv(num_rows, _MINE)
  lanes = jnp.arange(_MINE, dtype=jnp.int32)

  def count(counts: Callable[[jax.Array, jax.Array], jax.Array]) -> jax.Array:
    """Counts for each lane the rows of which `counts(keys, rows)` holds."""

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
      at = i * _AT_ONCE + jnp.arange(_AT_ONCE, dtype=jnp.int32)
      keys = plgpu.load(keys_ref.at[jnp.minimum(at, num_rows - 1)])
      found = counts(keys[None, :], at[None, :]) & (at < num_rows)[None, :]
      return total + found.astype(jnp.int32).sum(1)

    zeros = jnp.zeros((_MINE,), jnp.int32)
    return lax.fori_loop(0, pl.cdiv(num_rows, _AT_ONCE), add, zeros)

  # Lanes beyond the last row, or group, do what it does: no store has a mask.
  @pl.when(block < row_blocks)
  def place() -> None:
    rows = jnp.minimum(block * _MINE + lanes, num_rows - 1)
    mine = plgpu.load(keys_ref.at[rows])
    places = count(
      lambda keys, at: (
        (keys < mine[:, None])
        | ((keys == mine[:, None]) & (at < rows[:, None]))
      )
    )
    plgpu.store(places_ref.at[rows], places)
    plgpu.store(order_ref.at[places], rows)

  @pl.when(block >= row_blocks)
  def measure() -> None:
    groups = jnp.minimum((block - row_blocks) * _MINE + lanes, num_groups - 1)
    sizes = count(lambda keys, at: keys == groups[:, None])
    plgpu.store(sizes_ref.at[groups], sizes)
