# SPDX-License-Identifier: Apache-2.0
"""The functions to call: products of rows with matrices in panels.

A panel is `COLUMNS` columns of a matrix, of which those of a row lie together:
so a product of many columns reads it from its beginning to its end.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.llvm import COLUMNS
from pallas_kernels.panel_matmul import reference

DTYPES = ('float32', 'bfloat16', 'float16')  # that panels may have
_TARGET = 'pallas_kernels.panel_matmul.{}'


def is_available(dtype: str = 'float32') -> bool:
  """Says whether there is a kernel for this processor; compiles it once.

  Args:
    dtype: of panels, one of DTYPES.
  """
  return _register(dtype)


@functools.cache
def _register(dtype: str) -> bool:
  # Who has GPUs needs no LLVM.
  from pallas_kernels.llvm import panels
  from pallas_kernels.panel_matmul import kernel

  return kernel.register(
    _TARGET.format(dtype),
    len(jax.local_devices(backend='cpu')),
    panels.KEPT[dtype],
  )


def to_panels(w: Any) -> Any:
  """Returns a matrix in panels.

  Args:
    w: [..., in, out], of NumPy or JAX; out is a multiple of COLUMNS.

  Returns:
    [..., out / COLUMNS, in * COLUMNS], of the same dtype.
  """
  return reference.to_panels(w)


def matmul(x: jax.Array, panels: jax.Array) -> jax.Array:
  """Returns x @ w, [T, out] float32; a row's result depends on no other row.

  Args:
    x: [T, in] float32.
    panels: `to_panels` of w, in one of DTYPES: what is multiplied is float32.
  """
  sizes = jnp.full(1, x.shape[0], jnp.int32)
  return grouped_matmul(x, panels[None], sizes)


def grouped_matmul(
  x: jax.Array, panels: jax.Array, group_sizes: jax.Array
) -> jax.Array:
  """Multiplies each row by its group's matrix.

  Args:
    x: [R, in] float32, group after group.
    panels: `to_panels` of [G, in, out], in one of DTYPES.
    group_sizes: [G] int32; their sum is at most R.

  Returns:
    [R, out] float32. Rows of no group are undefined.

  Raises:
    NotImplementedError: there is no kernel for this processor, or dtype.
  """
  dtype = panels.dtype.name
  if dtype not in DTYPES:
    raise NotImplementedError(f'panel_matmul: not for panels of {dtype}.')
  if not is_available(dtype):
    raise NotImplementedError('panel_matmul: not for this processor.')
  num_out = panels.shape[1] * COLUMNS
  result = jax.ShapeDtypeStruct((x.shape[0], num_out), jnp.float32)
  out: jax.Array = jax.ffi.ffi_call(_TARGET.format(dtype), result)(
    x, panels, group_sizes
  )
  return out
