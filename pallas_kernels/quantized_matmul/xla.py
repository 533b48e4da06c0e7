# SPDX-License-Identifier: Apache-2.0
"""In JAX's own operations. The way on CPUs.

Rows are multiplied by codes, which x's dtype holds exactly, in sums of float32:
a group's sum is multiplied by its scales, and all groups are added. So no
matrix is put together, but for many rows and several groups, where sums of each
group would be more bytes than the matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.quantized_matmul import operand

_SUM_BYTES = 4  # float32's


def quantized_matmul(
  x: jax.Array,
  w: operand.Operand,
  codes: str,
  group: int | None,
  dtype: jax.typing.DTypeLike,
) -> jax.Array:
  """Multiplies rows by a matrix in codes; see `api.quantized_matmul`."""
  (num_rows, rows), (groups, _) = x.shape, w.scale.shape
  found = operand.numbers(w, codes, rows, group)
  scale = operand.scales(w.scale)
  if groups == 1:
    out = _dot(x, found.astype(x.dtype)) * scale
  elif _SUM_BYTES * num_rows * groups > x.dtype.itemsize * rows:
    matrix = found.astype(jnp.float32) * operand.spread(scale, rows, group)
    out = _dot(x, matrix.astype(x.dtype))
  else:
    assert group is not None
    out = functools.reduce(
      jnp.add,
      (
        jnp.sum(_dot(some, codes) * scale[:, None], axis=0)
        for some, codes, scale in _groups(x, found, scale, group)
      ),
    )
  return out.astype(dtype)


def _groups(
  x: jax.Array, found: jax.Array, scale: jax.Array, group: int
) -> Iterator[tuple[jax.Array, jax.Array, jax.Array]]:
  """Yields n groups of a size: all, and the last one if it is smaller.

  Of each, the numbers of x [n, T, size], what codes stand for [n, size, out],
  as numbers like these, and the scales [n, out].
  """
  rows, columns = found.shape
  whole, rest = divmod(rows, group)
  for first, num, size in ((0, whole, group), (whole, 1, rest)):
    if size:
      span = slice(first * group, first * group + num * size)
      of_x = x[:, span].reshape(-1, num, size).swapaxes(0, 1)
      codes = found[span].reshape(num, size, columns)
      yield of_x, codes.astype(x.dtype), scale[first : first + num]


def _dot(x: jax.Array, w: jax.Array) -> jax.Array:
  return jnp.matmul(x, w, preferred_element_type=jnp.float32)
