# SPDX-License-Identifier: Apache-2.0
"""The function to call: a product of rows with a matrix in codes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.quantized_matmul import operand
from pallas_kernels.quantized_matmul import pallas_triton
from pallas_kernels.quantized_matmul import reference
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
    dtype: of the result; None: x's.
    implementation: a key of `IMPLEMENTATIONS`; None: the fastest here.

  Returns:
    [T, out]. It can be differentiated, by x and scale.

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
  operand.check(w, codes, x.shape[1], group)
  dtype = jnp.dtype(x.dtype if dtype is None else dtype)
  if implementation is None:
    implementation = tuning.fastest(tuning.Shape.of(x, w, codes, group))
  if implementation != 'pallas_triton':
    return IMPLEMENTATIONS[implementation](x, w, codes, group, dtype)
  return _multiply(codes, group, dtype, x, w)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _multiply(
  codes: str, group: int | None, dtype: Any, x: jax.Array, w: operand.Operand
) -> jax.Array:
  return pallas_triton.quantized_matmul(x, w, codes, group, dtype)


def _forward(codes: str, group: int | None, dtype: Any, *args: Any) -> Any:
  return _multiply(codes, group, dtype, *args), args


def _backward(
  codes: str, group: int | None, dtype: Any, args: Any, gradient: jax.Array
) -> Any:
  x, w = args
  _, pull = jax.vjp(
    lambda x, scale: xla.quantized_matmul(
      x, w._replace(scale=scale), codes, group, dtype
    ),
    x,
    w.scale,
  )
  of_x, of_scale = pull(gradient)
  if w.scale.dtype != jnp.float32:
    of_scale = None
  return of_x, operand.Operand(None, of_scale, None)


_multiply.defvjp(_forward, _backward)
