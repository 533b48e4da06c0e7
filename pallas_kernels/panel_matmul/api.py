# SPDX-License-Identifier: Apache-2.0
"""The functions to call: products of rows with matrices in panels.

A panel is `COLUMNS` columns of a matrix, of which those of a row lie together:
so a product of many columns reads it from its beginning to its end.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.llvm import COLUMNS
from pallas_kernels.panel_matmul import reference
from pallas_kernels.quantized_matmul import operand

DTYPES = ('float32', 'bfloat16', 'float16')  # that panels may have
_TARGET = 'pallas_kernels.panel_matmul.{}'


class Coded(NamedTuple):
  """What codes in panels are; see `quantized_matmul.operand`.

  Attributes:
    codes: a key of `operand.CODES`.
    scale: `to_panels` of [G, groups, out], of the dtype that `CODES` says.
    zero: `to_panels` of [G, groups, out] uint8, of int4, the codes of 0; None:
      they are 8.
    group: rows of the matrix that have scales in common, of codes of 4 bits a
      multiple of 32; None: all.
  """

  codes: str
  scale: Any
  zero: Any = None
  group: int | None = None

  @property
  def kept(self) -> str:
    """How panels keep them: a key of `llvm.kept.KEPT`."""
    return self.codes if self.zero is None else f'{self.codes}_zeros'


def is_available(kept: str = 'float32') -> bool:
  """Says whether there is a kernel for this processor; compiles it once.

  Args:
    kept: one of DTYPES, or `Coded.kept`.
  """
  return _register(kept)


@functools.cache
def _register(kept: str) -> bool:
  # Who has GPUs needs no LLVM.
  from pallas_kernels.llvm import kept as kept_lib
  from pallas_kernels.panel_matmul import kernel

  return kernel.register(
    _TARGET.format(kept),
    len(jax.local_devices(backend='cpu')),
    kept_lib.KEPT[kept],
  )


def to_panels(w: Any) -> Any:
  """Returns a matrix in panels.

  Args:
    w: [..., in, out], of NumPy or JAX; out is a multiple of COLUMNS.

  Returns:
    [..., out / COLUMNS, in * COLUMNS], of the same dtype.
  """
  return reference.to_panels(w)


def in_pairs(values: Any) -> Any:
  """Returns packed codes as panels have them: a byte's rows are neighbours.

  So products are summed in the order of the rows.

  Args:
    values: [..., bytes, out] uint8, as `quantized_matmul.operand` says.

  Returns:
    The same shape: byte i has row 2 i in its low half, and the next one in its
    high one.
  """
  return reference.in_pairs(values)


def matmul(x: jax.Array, panels: jax.Array) -> jax.Array:
  """Returns x @ w, [T, out] float32; a row's result depends on no other row.

  Args:
    x: [T, in] float32.
    panels: `to_panels` of w, in one of DTYPES: what is multiplied is float32.
  """
  sizes = jnp.full(1, x.shape[0], jnp.int32)
  return grouped_matmul(x, panels[None], sizes)


def grouped_matmul(
  x: jax.Array,
  panels: jax.Array,
  group_sizes: jax.Array,
  coded: Coded | None = None,
) -> jax.Array:
  """Multiplies each row by its group's matrix.

  Args:
    x: [R, in] float32, group after group.
    panels: `to_panels` of [G, in, out], in one of DTYPES; or of codes, those
      of 4 bits `in_pairs`, [G, bytes, out].
    group_sizes: [G] int32; their sum is at most R.
    coded: what panels of codes are; None: they are numbers.

  Returns:
    [R, out] float32. Rows of no group are undefined.

  Raises:
    NotImplementedError: there is no kernel for this processor, or dtype.
  """
  kept = panels.dtype.name if coded is None else coded.kept
  if coded is None and kept not in DTYPES:
    raise NotImplementedError(f'panel_matmul: not for panels of {kept}.')
  if not is_available(kept):
    raise NotImplementedError('panel_matmul: not for this processor.')
  _, num_panels, size = panels.shape
  arguments = [x, panels, group_sizes]
  if coded is not None:
    rows = size // COLUMNS * (8 // operand.CODES[coded.codes].bits)
    # The last block of codes of 4 bits may have more rows than the matrix.
    arguments[0] = jnp.pad(x, ((0, 0), (0, rows - x.shape[1])))
    group = jnp.full(1, coded.group or rows, jnp.int32)
    zero = coded.scale if coded.zero is None else coded.zero  # is not read
    arguments += [coded.scale, zero, group]
  result = jax.ShapeDtypeStruct((x.shape[0], num_panels * COLUMNS), jnp.float32)
  out: jax.Array = jax.ffi.ffi_call(_TARGET.format(kept), result)(*arguments)
  return out
