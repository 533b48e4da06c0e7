# SPDX-License-Identifier: Apache-2.0
"""The function to call: a product of rows with a matrix in codes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.quantized_matmul import operand
from pallas_kernels.quantized_matmul import pallas_triton
from pallas_kernels.quantized_matmul import reference
from pallas_kernels.quantized_matmul import rows
from pallas_kernels.quantized_matmul import tuning
from pallas_kernels.quantized_matmul import xla

IMPLEMENTATIONS: Mapping[str, Callable[..., jax.Array]] = {
  'reference': reference.quantized_matmul,
  'xla': xla.quantized_matmul,
  'pallas_triton': pallas_triton.quantized_matmul,
}


def quantized_matmul(
  x: jax.Array,
  values: jax.Array,
  scale: jax.Array,
  *,
  codes: str,
  group: int | None = None,
  zero: jax.Array | None = None,
  activations: str | None = None,
  by_columns: bool = False,
  dtype: jax.typing.DTypeLike | None = None,
  implementation: str | None = None,
) -> jax.Array:
  """Multiplies rows by a matrix in codes.

  Codes stand for numbers that x's dtype holds exactly. Products are summed in
  float32, those of each group multiplied by its scales, in float32, too, and
  rounded once, in the end; but for `xla` of many rows and several groups, which
  rounds the matrix to x's dtype. What a row's result is depends on no other
  row; the order of its sums may be another for another number of rows.

  Worked example: x=[[1, 2]], values=[[3], [4]] and scale=[[10]] -> [[110]].

  Args:
    x: [T, in] float32, bfloat16 or float16.
    values: the codes, [in, out] or [bytes, out]; see `operand`.
    scale: [groups, out], float32, or what `operand.CODES` says.
    codes: a key of `operand.CODES`.
    group: rows of a group, of which the last may have fewer; None: all.
    zero: [groups, out] uint8, of int4, the codes of 0; None: they are 8.
    activations: what rows of x are rounded to first, of `rows.CODES`, which
      Hopper then multiplies as such; None: they stay as they are.
    by_columns: whether values are [out, in], as Hopper multiplies rows of 8
      bits by; only with codes of 8 bits.
    dtype: of the result; None: x's.
    implementation: a key of `IMPLEMENTATIONS`; None: the fastest here.

  Returns:
    [T, out]. It can be differentiated, by x and scale; where rows are rounded,
    as if they had not been.

  Raises:
    ValueError: shapes or dtypes don't fit; says which and why.
    NotImplementedError: the implementation can't run here.
  """
  if implementation not in (None, *IMPLEMENTATIONS):
    raise ValueError(
      f'{implementation=}: must be None or one of {", ".join(IMPLEMENTATIONS)}.'
    )
  w = operand.Operand(values, scale, zero)
  if x.ndim != 2 or x.dtype.name not in ('float32', 'bfloat16', 'float16'):
    raise ValueError(
      f'x={x.dtype}{x.shape}: must be float32, bfloat16 or float16, of 2 axes.'
    )
  operand.check(w, codes, x.shape[1], group, by_columns=by_columns)
  rows.check(activations, codes, len(scale))
  dtype = jnp.dtype(x.dtype if dtype is None else dtype)
  if implementation is None:
    implementation = tuning.fastest(
      tuning.Shape.of(x, w, codes, group, by_columns)
    )
  if by_columns and implementation != 'pallas_triton':
    w, by_columns = w._replace(values=values.T), False
  how = _How(implementation, codes, group, activations, by_columns, dtype)
  if implementation != 'pallas_triton' and activations is None:
    return how.multiply(x, w)
  return _multiply(how, x, w)


class _How(NamedTuple):
  """The arguments of a product but for arrays."""

  implementation: str
  codes: str
  group: int | None
  activations: str | None
  by_columns: bool
  dtype: Any

  def multiply(self, x: jax.Array, w: operand.Operand) -> jax.Array:
    product = IMPLEMENTATIONS[self.implementation]
    if self.by_columns:
      product = functools.partial(product, by_columns=True)
    if self.activations is None:
      return product(x, w, self.codes, self.group, self.dtype)
    found, scale = rows.rounded(x)
    if self.implementation == 'pallas_triton':
      return product(found, w, self.codes, self.group, self.dtype, scale=scale)
    # x's dtype holds them exactly.
    found = found.astype(x.dtype)
    out = product(found, w, self.codes, self.group, jnp.float32)
    return (out * scale).astype(self.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply(how: _How, x: jax.Array, w: operand.Operand) -> jax.Array:
  return how.multiply(x, w)


def _forward(how: _How, *args: Any) -> Any:
  return _multiply(how, *args), args


def _backward(how: _How, args: Any, gradient: jax.Array) -> Any:
  x, w = args
  if how.by_columns:
    w = w._replace(values=w.values.T)
  _, pull = jax.vjp(
    lambda x, scale: xla.quantized_matmul(
      x, w._replace(scale=scale), how.codes, how.group, how.dtype
    ),
    x,
    w.scale,
  )
  of_x, of_scale = pull(gradient)
  if w.scale.dtype != jnp.float32:
    of_scale = None
  return of_x, operand.Operand(None, of_scale, None)


_multiply.defvjp(_forward, _backward)
