# SPDX-License-Identifier: Apache-2.0
"""Multiplies by quantized matrices; see `quantization` for what these are.

Rows are multiplied by codes, which the model's dtype holds exactly, in sums of
float32: a group's sum is multiplied by its scales, and all groups are added. So
no matrix is put together, but for many rows and several groups, where sums of
each group would be more bytes than the matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sarathi_jax.models import quantization as quantization_lib
from sarathi_jax.models import spec

_SUM_BYTES = 4  # float32's
_LEAST_SCALE = 2.0**-126  # float32's

_IN, _OUT = -2, -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class Quantized:
  """A matrix in codes, a node of params.

  Attributes:
    values: the codes, [..., in, out]; or what stands for them in a tree, such
      as a spec.
    scale: [..., groups, out] float32.
    group: rows of a group; None: all.
  """

  values: Any
  scale: Any
  group: int | None = dataclasses.field(default=None, metadata={'static': True})

  def multiply(self, x: Float[Array, '... T in'], dtype: Any) -> Array:
    """Returns x @ w, [..., T, out], summed in float32, in `dtype`."""
    sums = _SUM_BYTES * x.shape[_IN] * self.scale.shape[_IN]
    if self.scale.shape[_IN] == 1:
      out = _dot(x, self.values.astype(x.dtype)) * self.scale
    elif sums > x.dtype.itemsize * x.shape[-1]:
      out = _dot(x, dequantize(self, x.dtype))
    else:
      out = functools.reduce(
        jnp.add,
        (
          jnp.sum(_dot(rows, codes) * scale[..., None, :], axis=-3)
          for rows, codes, scale in self._groups(x)
        ),
      )
    return out.astype(dtype)

  def _groups(self, x: Array) -> Iterator[tuple[Array, Array, Array]]:
    """Yields n groups of a size: all, and the last one if it is smaller.

    Of each, the numbers of x [..., n, T, size], the codes [..., n, size, out],
    as numbers like these, and the scales [..., n, out].
    """
    *front, rows, columns = self.values.shape
    assert self.group is not None
    whole, rest = divmod(rows, self.group)
    for first, num, size in ((0, whole, self.group), (whole, 1, rest)):
      if size:
        span = slice(first * self.group, first * self.group + num * size)
        of_x = x[..., span].reshape(*x.shape[:-1], num, size)
        codes = self.values[..., span, :].reshape(*front, num, size, columns)
        scale = self.scale[..., first : first + num, :]
        yield of_x.swapaxes(-2, -3), codes.astype(x.dtype), scale


def _dot(x: Array, w: Array) -> Array:
  return jnp.matmul(x, w, preferred_element_type=jnp.float32)


def dequantize(w: Quantized, dtype: Any) -> Array:
  """Returns the matrix [..., in, out], rounded once, to `dtype`."""
  rows = w.values.shape[_IN]
  scale = jnp.repeat(w.scale, w.group or rows, axis=_IN)[..., :rows, :]
  return (w.values.astype(jnp.float32) * scale).astype(dtype)


def encode(w: Any, codes: str, group: int | None = None) -> tuple[Any, Any]:
  """Rounds a matrix to the nearest codes, by the largest number of each group.

  Args:
    w: [..., in, out], finite; a NumPy array or a jax.Array.
    codes: of `quantization.CODES`.
    group: rows of a group; None: all.

  Returns:
    The codes, and the scales [..., groups, out] float32, of w's kind.
  """
  xp = w.__array_namespace__()
  kind = quantization_lib.CODES[codes]
  *front, rows, columns = w.shape
  size = group or rows
  w = w.astype(xp.float32)
  padding = [(0, 0)] * len(front) + [(0, -rows % size), (0, 0)]
  groups = xp.pad(w, padding).reshape(*front, -1, size, columns)
  most = xp.max(xp.abs(groups), axis=_IN)
  scale = xp.maximum(most / xp.float32(kind.most), xp.float32(_LEAST_SCALE))
  values = w / xp.repeat(scale, size, axis=_IN)[..., :rows, :]
  dtype = jnp.dtype(kind.dtype)
  if dtype.kind == 'i':
    values = xp.rint(values)
  return values.astype(dtype), scale


def of(w: Array, quantization: quantization_lib.Quantization) -> Quantized:
  """Quantizes a matrix [..., in, out]; see `encode`."""
  values, scale = encode(w, quantization.codes, quantization.group)
  return Quantized(values, scale, quantization.group)


def specs_of(
  leaf: spec.ParamSpec, quantization: quantization_lib.Quantization
) -> Quantized:
  """Returns the specs of a matrix that is quantized, in their node."""
  *front, rows, columns = leaf.shape
  groups = quantization.num_groups(rows)
  *front_axes, in_axis, out_axis = leaf.axes
  axes = (*front_axes, in_axis if groups > 1 else None, out_axis)
  return Quantized(
    spec.ParamSpec(leaf.shape, leaf.axes, dtype=quantization.dtype),
    spec.ParamSpec(
      (*front, groups, columns), axes, dtype=quantization_lib.SCALE
    ),
    quantization.group,
  )
