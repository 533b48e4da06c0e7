# SPDX-License-Identifier: Apache-2.0
"""Multiplies by quantized matrices; see `quantization` for what these are.

`pallas_kernels.quantized_matmul` does, by codes as they are: on GPUs in a
kernel, elsewhere by XLA; where they lie in panels, `panel_matmul`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from pallas_kernels import grouped_matmul as grouped_matmul_lib
from pallas_kernels import panel_matmul
from pallas_kernels import quantized_matmul as quantized_matmul_lib
from sarathi_jax.models import codes as codes_lib
from sarathi_jax.models import panels
from sarathi_jax.models import quantization as quantization_lib
from sarathi_jax.models import spec

_IN, _OUT = -2, -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class Quantized:
  """A matrix in codes, a node of params.

  Attributes:
    values: the codes, [..., in, out]; of 4 bits, uint8 [..., bytes, out], see
      `quantization`. Or what stands for them in a tree, such as a spec.
    scale: [..., groups, out], float32 or the exponents that `Codes.scale` says.
    codes: of `quantization.CODES`.
    group: rows of a group; None: all.
    zero: [..., groups, out] uint8, the codes that stand for 0; None if they are
      what the codes say.
    order: [..., in] int32, the row of the matrix that each row of codes is;
      None: they are in order.
    gathered: the axis of the mesh whose devices each have a part of the rows,
      by `order` of all of the matrix: what these multiply is gathered first.
      None: they have all, or those that lie together.
    activations: what it rounds rows to before it multiplies them, see
      `Quantization`. A device rounds what it has of a row.
    by_columns: whether values are [out, in], of codes of 8 bits.
    in_panels: whether values, scale and zero lie in panels, as CPUs take them;
      see `panel_matmul.to_panels`, of codes of 4 bits also `in_pairs`.
  """

  values: Any
  scale: Any
  codes: str = dataclasses.field(metadata={'static': True})
  group: int | None = dataclasses.field(default=None, metadata={'static': True})
  zero: Any = None
  order: Any = None
  gathered: str | None = dataclasses.field(
    default=None, metadata={'static': True}
  )
  activations: str | None = dataclasses.field(
    default=None, metadata={'static': True}
  )
  by_columns: bool = dataclasses.field(default=False, metadata={'static': True})
  in_panels: bool = dataclasses.field(default=False, metadata={'static': True})

  def arrays(self) -> dict[str, Any]:
    """Returns the arrays that there are, by their names."""
    names = 'values', 'scale', 'zero', 'order'
    found = {name: getattr(self, name) for name in names}
    return {name: array for name, array in found.items() if array is not None}

  def multiply(
    self,
    x: Float[Array, '... T in'],
    dtype: Any,
    implementation: str | None = None,
  ) -> Array:
    """Returns x @ w, [..., T, out], summed in float32, in `dtype`.

    Args:
      x: rows; with the axes in front that the matrix has, or others if it has
        none.
      dtype: of the result.
      implementation: see `pallas_kernels.quantized_matmul`.
    """
    if self.in_panels:
      return self._by_panels(x).astype(dtype)
    if self.values.ndim > 2:
      several: Array = jax.vmap(lambda x, w: w.multiply(x, dtype, 'xla'))(
        x, self
      )
      return several
    if self.order is not None:
      x = jnp.take(self.gather(x), self.order, axis=-1)
    out = quantized_matmul_lib.quantized_matmul(
      x.reshape(-1, x.shape[-1]),
      self.values,
      self.scale,
      codes=self.codes,
      group=self.group,
      zero=self.zero,
      activations=self.activations,
      by_columns=self.by_columns,
      dtype=dtype,
      implementation=implementation,
    )
    return out.reshape(*x.shape[:-1], -1)

  def multiply_groups(
    self, x: Float[Array, 'R in'], group_sizes: Int[Array, ' G']
  ) -> Float[Array, 'R out']:
    """Multiplies rows, group after group, by theirs of matrices in panels."""
    return self._rounded(
      x,
      lambda x, coded: panels.multiply_groups(
        x, self.values, group_sizes, coded
      ),
    )

  def _by_panels(self, x: Float[Array, '... T in']) -> Array:
    if self.order is not None:
      x = jnp.take_along_axis(self.gather(x), self.order[..., None, :], axis=-1)
    return self._rounded(
      x, lambda x, coded: panels.multiply(x, self.values, coded)
    )

  def _rounded(self, x: Array, multiply: Callable[..., Array]) -> Array:
    """Multiplies rows, rounded before if they are to be, by codes in panels."""
    coded = panel_matmul.Coded(self.codes, self.scale, self.zero, self.group)
    if self.activations is None:
      return multiply(x, coded)
    found, scale = quantized_matmul_lib.rounded(x)
    return multiply(found, coded) * scale

  def gather(self, x: Float[Array, '*T in']) -> Float[Array, '*T all']:
    """Returns x as `order` counts: with the parts of all devices."""
    if self.gathered is None:
      return x
    whole: Array = lax.all_gather(x, self.gathered, axis=x.ndim - 1, tiled=True)
    return whole

  def _numbers(self, rows: int) -> Array:
    values = self.values
    if self.by_columns:
      values = values.swapaxes(_IN, _OUT)
    numbers: Array = codes_lib.numbers(
      values, self.codes, rows, self.group, self.zero
    )
    return numbers

  def _scaled(self, rows: int) -> Array:
    """Returns the matrix, its rows in the order of the codes', in float32."""
    scale = codes_lib.scales(self.scale, self.codes)
    spread = codes_lib.spread(scale, rows, self.group)
    scaled: Array = self._numbers(rows).astype(np.float32) * spread
    return scaled


def coded(
  matrices: Sequence[Any],
) -> tuple[list[quantized_matmul_lib.Operand], grouped_matmul_lib.Coded] | None:
  """Returns experts' matrices, and how to multiply by them, for kernels.

  Returns:
    None if they are not all in codes of one way, with their rows in order, or
    some lie in panels.
  """
  ways = {
    (w.codes, w.group, w.activations, w.by_columns)
    if isinstance(w, Quantized) and w.order is None and not w.in_panels
    else None
    for w in matrices
  }
  if len(ways) > 1 or (way := ways.pop()) is None:
    return None
  return (
    [quantized_matmul_lib.Operand(w.values, w.scale, w.zero) for w in matrices],
    grouped_matmul_lib.Coded(*way),
  )


def in_order(
  x: Float[Array, 'R in'], w: Any, group_sizes: Int[Array, ' G']
) -> tuple[Float[Array, 'R in'], Any]:
  """Returns rows as the codes of their groups' matrices take them, and these.

  Args:
    x: rows, group after group.
    w: the matrices [G, in, out] of all groups.
    group_sizes: the rows of each.
  """
  if not isinstance(w, Quantized) or w.order is None:
    return x, w
  places = jnp.arange(x.shape[0], dtype=jnp.int32)
  group = jnp.searchsorted(jnp.cumsum(group_sizes), places, side='right')
  order = jnp.take(w.order, group, axis=0, mode='clip')
  x = jnp.take_along_axis(w.gather(x), order, axis=-1)
  return x, dataclasses.replace(w, order=None, gathered=None)


def dequantize(w: Quantized, dtype: Any, rows: int | None = None) -> Any:
  """Returns the matrix [..., in, out], rounded once, to `dtype`.

  Args:
    w: of NumPy's arrays, or jax.Arrays.
    dtype: of the result.
    rows: in; None: as many as there are codes, which are whole blocks of them
      where they have 4 bits.
  """
  if w.in_panels:
    arrays = w.arrays()
    arrays.pop('order', None)
    apart = {name: panel_matmul.from_panels(x) for name, x in arrays.items()}
    if quantization_lib.CODES[w.codes].bits == 4:
      apart['values'] = panel_matmul.from_pairs(apart['values'])
    w = dataclasses.replace(w, **apart, in_panels=False)
  if rows is None:
    is_packed = quantization_lib.CODES[w.codes].bits == 4
    kept = w.values.shape[_OUT if w.by_columns else _IN]
    rows = kept * (2 if is_packed else 1)
  matrix = w._scaled(rows)
  if w.order is not None:
    xp = w.order.__array_namespace__()
    places = xp.argsort(w.order, axis=-1)[..., None]
    matrix = xp.take_along_axis(matrix, places, axis=_IN)
  return matrix.astype(dtype)


def of(w: Array, how: quantization_lib.Quantization) -> Quantized:
  """Rounds a matrix [..., in, out]; see `codes.encode`.

  What has zero points has those of codes without, and rows are in order.
  """
  values, scale = codes_lib.encode(w, how.codes, how.group)
  order = zero = None
  if how.zeros:
    zero = jnp.full(scale.shape, quantization_lib.INT4_ZERO, jnp.uint8)
  if how.reordered:
    order = jnp.broadcast_to(
      jnp.arange(w.shape[_IN], dtype=jnp.int32), (*w.shape[:-2], w.shape[_IN])
    )
  return Quantized(
    values,
    scale,
    how.codes,
    how.group,
    zero,
    order,
    activations=how.activations,
  )


def specs_of(
  leaf: spec.ParamSpec, how: quantization_lib.Quantization
) -> Quantized:
  """Returns the specs of a matrix that is quantized, in their node."""
  *front, rows, columns = leaf.shape
  groups = how.num_groups(rows)
  *front_axes, in_axis, out_axis = leaf.axes
  axes = (*front_axes, in_axis if groups > 1 else None, out_axis)
  of_groups = (*front, groups, columns), axes
  kind = how.kind
  return Quantized(
    spec.ParamSpec(
      (*front, kind.rows_of(rows), columns), leaf.axes, dtype=kind.dtype
    ),
    spec.ParamSpec(*of_groups, dtype=kind.scale),
    how.codes,
    how.group,
    spec.ParamSpec(*of_groups, dtype='uint8') if how.zeros else None,
    spec.ParamSpec((*front, rows), (*front_axes, in_axis), dtype='int32')
    if how.reordered
    else None,
    activations=how.activations,
  )
