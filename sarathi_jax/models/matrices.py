# SPDX-License-Identifier: Apache-2.0
"""Multiplies by matrices of weights, however these lie in memory.

`matmul` is the one place where a weight is multiplied, and `grouped_matmul`
the one for experts'. A matrix is an array, or a node of params that has all
there is to know of it: a class with the methods of `Matrix`, where a layout
wants it, or `quantized.Quantized`, where the model says so. Nodes may have
arrays of any dtype; what is multiplied, and the product, are in the model's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
import dataclasses
import itertools
from typing import Any, Protocol, Self

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import grouped_matmul as grouped_matmul_lib
from pallas_kernels import panel_matmul
from sarathi_jax.models import panels
from sarathi_jax.models import quantized

# With more rows, copies of W take a small part of the time, and copies of x^T
# a large one.
_FEW_ROWS = 256

IN, OUT = -2, -1  # a matrix's axes, behind those of experts


class Matrix(Protocol):
  """A way to keep a matrix [..., in, out]: a dataclass of arrays, registered.

  Each array has all axes of the matrix, in whatever order. On a mesh each
  device makes its own part of the node from its part of the matrix.
  """

  @classmethod
  def axes(cls) -> Self:
    """Returns for each array the matrix's axes that its last two follow."""

  @classmethod
  def of(cls, w: Any) -> Matrix:
    """Makes the node of a matrix, a NumPy array or a jax.Array, as it is.

    It may be another class's, by the matrix's shape and dtype.
    """

  def multiply(self, x: Float[Array, '... T in'], dtype: Any) -> Array:
    """Returns x @ w, [..., T, out], summed in `dtype`."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class Transposed:
  """A matrix that is kept as an array [..., out, in].

  On a CPU, XLA multiplies x @ W in panels of W, which it first copies to be
  able to read them: with the few rows of decodes, that takes a third of the
  time. In W^T @ x^T it copies panels of x^T, which are few, and reads W^T in
  place.

  Attributes:
    array: [..., out, in]; or what stands for it in a tree, such as a spec.
  """

  array: Any

  @classmethod
  def axes(cls) -> Transposed:
    return cls((OUT, IN))

  @classmethod
  def of(cls, w: Any) -> Transposed:
    return cls(w.swapaxes(IN, OUT))

  def multiply(self, x: Float[Array, '... T in'], dtype: Any) -> Array:
    def by_rows(x: Array, w: Array) -> Array:
      return jnp.matmul(x, w.swapaxes(IN, OUT), preferred_element_type=dtype)

    def by_columns(x: Array, w: Array) -> Array:
      # Without barriers XLA swaps the operands back.
      columns = lax.optimization_barrier(x.swapaxes(IN, OUT))
      out = jnp.matmul(w, columns, preferred_element_type=dtype)
      return lax.optimization_barrier(out).swapaxes(IN, OUT)

    if x.shape[IN] > _FEW_ROWS:
      return by_rows(x, self.array)
    out: Array = lax.platform_dependent(
      x, self.array, cpu=by_columns, default=by_rows
    )
    return out


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class Panels:
  """A matrix on a CPU, in panels of a few columns.

  It is kept as it comes, in 32 bits or in 16, and multiplied in float32.

  Attributes:
    array: [..., out / COLUMNS, in * COLUMNS], see `panel_matmul.to_panels`; or
      what stands for it in a tree, such as a spec.
  """

  array: Any

  @classmethod
  def axes(cls) -> Panels:
    return cls((OUT, IN))

  @classmethod
  def of(cls, w: Any) -> Panels | Transposed:
    """Makes the node; `Transposed` of a matrix that panels don't divide.

    That one is float32, for XLA would widen it each time that it is used.
    """
    if w.shape[OUT] % panel_matmul.COLUMNS:
      return Transposed.of(w.astype(jnp.float32))
    return cls(panel_matmul.to_panels(w))

  def multiply(self, x: Float[Array, '... T in'], dtype: Any) -> Array:
    return panels.multiply(x, self.array).astype(dtype)

  def multiply_groups(
    self, x: Float[Array, 'R in'], group_sizes: Int[Array, ' G']
  ) -> Float[Array, 'R out']:
    """Multiplies rows, group after group, by theirs of the matrices."""
    return panels.multiply_groups(x, self.array, group_sizes)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class Table(Panels):
  """An embedding [V, D] on a CPU, whose transpose is the output matrix.

  It is kept as that one, in panels of 16 tokens, and a token's row is read out
  of its panel, as float32. V is a multiple of 16.
  """

  @classmethod
  def axes(cls) -> Table:
    return cls((IN, OUT))

  @classmethod
  def of(cls, w: Any) -> Table:
    return cls(panel_matmul.to_panels(w.swapaxes(IN, OUT)))

  @property
  def num_rows(self) -> int:
    return int(self.array.shape[0]) * panel_matmul.COLUMNS

  def rows(self, tokens: Int[Array, ' T']) -> Float[Array, 'T D']:
    """Returns rows of the embedding, of ids that are cut to [0, V)."""
    tokens = jnp.clip(tokens, 0, self.num_rows - 1)
    panel, column = jnp.divmod(tokens, panel_matmul.COLUMNS)
    lines = self.array.reshape(len(self.array), -1, panel_matmul.COLUMNS)
    rows: Array = lines[panel, :, column]
    return rows.astype(jnp.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class PackedPanels(Panels):
  """Codes of 4 bits in panels; `quantized.Quantized` multiplies by them."""

  @classmethod
  def of(cls, w: Any) -> PackedPanels:
    return cls(panel_matmul.to_panels(panel_matmul.in_pairs(w)))


def matmul(
  x: Float[Array, '... T in'], w: Any, dtype: Any = None
) -> Float[Array, '... T out']:
  """Returns x @ w; both may have the same axes in front, such as experts'.

  Args:
    x: rows.
    w: the matrix [..., in, out]: an array, or a `Matrix`.
    dtype: of the sums and the result; None: that of x.
  """
  if not hasattr(w, 'multiply'):
    return jnp.matmul(x, w, preferred_element_type=dtype)
  product: Array = w.multiply(x, x.dtype if dtype is None else dtype)
  return product


def grouped_matmul(
  x: Float[Array, 'T in'],
  matrices: Sequence[Any],
  group_sizes: Int[Array, ' G'],
  *,
  rows: Int[Array, ' R'] | None = None,
  biases: Sequence[Float[Array, 'G out']] = (),
  combine: Callable[..., Array] = grouped_matmul_lib.first,
) -> Float[Array, 'R out']:
  """Multiplies each row by the matrix of its group, such as an expert.

  Args:
    x, group_sizes, rows, biases, combine: see `pallas_kernels.grouped_matmul`.
    matrices: of one kind, or of several: each an array [G, in, out], or a
      `Matrix`.
  """
  multiply: Any = None
  if any(getattr(w, 'order', None) is not None for w in matrices):
    multiply = _in_order
  elif all(
    isinstance(w, Panels) or getattr(w, 'in_panels', False) for w in matrices
  ):
    multiply = _in_panels
  if multiply is not None:
    if rows is not None:
      x = jnp.take(x, rows, axis=0)
    products = [
      multiply(x, w, group_sizes, biases[i : i + 1])
      for i, w in enumerate(matrices)
    ]
    return combine(*products).astype(x.dtype)
  matmul: Any = None
  if any(hasattr(w, 'multiply') for w in matrices):
    matmul = _of_group
  if (coded := quantized.coded(matrices)) is not None:
    matrices, matmul = coded
  return grouped_matmul_lib.grouped_matmul(
    x,
    matrices,
    group_sizes,
    rows=rows,
    biases=biases,
    combine=combine,
    matmul=matmul,
  )


def _in_order(
  x: Float[Array, 'R in'],
  w: quantized.Quantized,
  group_sizes: Int[Array, ' G'],
  biases: Sequence[Float[Array, 'G out']],
) -> Float[Array, 'R out']:
  """Does one kind alone, as each takes its rows in an order of its own."""
  given, codes = quantized.in_order(x, w, group_sizes)
  out = grouped_matmul(given, [codes], group_sizes, biases=biases)
  return out.astype(jnp.float32)


def _in_panels(
  x: Float[Array, 'R in'],
  w: Panels | quantized.Quantized,
  group_sizes: Int[Array, ' G'],
  biases: Sequence[Float[Array, 'G out']],
) -> Float[Array, 'R out']:
  out = w.multiply_groups(x, group_sizes)
  for bias in biases:
    out += jnp.repeat(bias, group_sizes, axis=0, total_repeat_length=len(x))
  return out


def _of_group(x: Float[Array, 'n in'], w: Any) -> Float[Array, 'n out']:
  if isinstance(w, Transposed) and x.shape[IN] == 1:
    # With barriers, XLA copies what it takes out of all groups' matrices.
    w = w.array.swapaxes(IN, OUT)
  if isinstance(w, quantized.Quantized):
    # XLA takes it out of all groups' where it multiplies; a kernel could not.
    return w.multiply(x, jnp.float32, implementation='xla')
  return matmul(x, w, jnp.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class SideBySide:
  """Matrices that multiply the same rows, kept as one; or their biases.

  Attributes:
    matrix: all columns, an array or a `Matrix`. On a mesh each device has its
      columns of each.
    widths: the numbers of columns of one device.
  """

  matrix: Any
  widths: tuple[int, ...] = dataclasses.field(metadata={'static': True})

  def multiply(
    self, x: Float[Array, 'T in'], bias: SideBySide | None = None
  ) -> Iterable[Float[Array, 'T columns']]:
    """Returns x @ each of them, plus its bias if there are some.

    They are added before the product is cut, and so by the launch that makes
    it.
    """
    ends = list(itertools.accumulate(self.widths))[:-1]
    out = matmul(x, self.matrix)
    if bias is not None:
      out += bias.matrix[None]
    return jnp.split(out, ends, axis=OUT)
