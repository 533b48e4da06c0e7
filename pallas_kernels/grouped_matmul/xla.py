# SPDX-License-Identifier: Apache-2.0
"""In JAX's own operations: loops over blocks of rows. The way on CPUs.

A block has rows of one group, and each turn multiplies one by the group's
matrices. There are as many turns as blocks with rows, so matrices of groups
without any are not read, and rows of no group cost nothing. On CPUs XLA
multiplies several rows by a copy of a matrix: so that it makes one a group, and
not one a block, blocks of a group are a loop of their own.

A turn writes as many rows as a block may have. Those beyond the group's end are
another's, whose block comes later and writes them again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from pallas_kernels import devices
from pallas_kernels.grouped_matmul import plan
from pallas_kernels.grouped_matmul import tuning


def grouped_matmul(
  x: jax.Array,
  matrices: tuple[Any, ...],
  group_sizes: jax.Array,
  rows: jax.Array,
  combine: Callable[..., jax.Array],
  matmul: Callable[[jax.Array, Any], jax.Array],
  biases: tuple[jax.Array, ...] = (),
  *,
  differentiable: bool = False,
) -> jax.Array:
  """Multiplies each row by its group's matrix; see `api.grouped_matmul`.

  Args:
    x, matrices, group_sizes, rows, combine, matmul, biases: see there.
    differentiable: whether to turn as often as could be needed, as reverse-mode
      differentiation takes it.
  """
  (num_rows,), (num_groups,) = rows.shape, group_sizes.shape
  size = tuning.xla_rows(num_rows, num_groups)
  blocks = -(-group_sizes // size)
  last, ends = jnp.cumsum(blocks), jnp.cumsum(group_sizes)
  rows = jnp.pad(rows, (0, size - 1))

  def take(group: jax.Array) -> Any:
    return jax.tree.map(
      lambda leaf: lax.dynamic_index_in_dim(leaf, group, keepdims=False),
      (matrices, biases),
    )

  def multiply(start: jax.Array, taken: Any) -> jax.Array:
    these = x[lax.dynamic_slice_in_dim(rows, start, size)]
    of_group, added = taken
    products = [matmul(these, w) for w in of_group]
    if added:
      products = [
        p + b[None, :].astype(p.dtype)
        for p, b in zip(products, added, strict=True)
      ]
    return combine(*products).astype(x.dtype)

  def store(start: jax.Array, taken: Any, out: jax.Array) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(
      out, multiply(start, taken), start, axis=0
    )

  def block(
    group: jax.Array, number: jax.Array, taken: Any, out: jax.Array
  ) -> jax.Array:
    start = ends[group] - group_sizes[group] + size * number
    return store(start, taken, out)

  def turn(i: jax.Array, out: jax.Array) -> jax.Array:
    group = (last <= i).sum(dtype=jnp.int32)
    number = i - last[group] + blocks[group]
    return block(group, number, take(group), out)

  def blocks_of_one(i: jax.Array, out: jax.Array) -> jax.Array:
    group = used[i]
    taken = lax.optimization_barrier(take(group))
    return lax.fori_loop(
      0, blocks[group], lambda n, out: block(group, n, taken, out), out
    )

  shape = jax.eval_shape(multiply, last[0], take(last[0])).shape
  out = jnp.zeros((num_rows + size - 1, *shape[1:]), x.dtype)
  if differentiable:
    return lax.fori_loop(
      0,
      plan.most_tiles(num_rows, num_groups, size),
      lambda i, out: lax.cond(i < last[-1], turn, lambda i, out: out, i, out),
      out,
    )[:num_rows]
  if devices.default().platform != 'cpu':
    return lax.fori_loop(0, last[-1], turn, out)[:num_rows]
  if size == 1:  # It is multiplied by the matrix where that lies.
    # Found once: a turn of a few us would launch four operations to find it.
    is_before = ends[None, :] <= jnp.arange(num_rows)[:, None]
    groups = is_before.sum(1, dtype=jnp.int32)
    return lax.fori_loop(
      0, ends[-1], lambda i, out: store(i, take(groups[i]), out), out
    )
  used = jnp.argsort(group_sizes == 0, stable=True)
  return lax.fori_loop(0, (group_sizes > 0).sum(), blocks_of_one, out)[
    :num_rows
  ]
