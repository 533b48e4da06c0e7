# SPDX-License-Identifier: Apache-2.0
"""Takes codes apart, and rounds to them; see `quantization` for what they are.

All functions take and return NumPy arrays, or jax.Arrays. No JAX is loaded.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from sarathi_jax.models import quantization as quantization_lib

_LEAST_SCALE = 2.0**-126  # float32's
_HALF = quantization_lib.BLOCK // 2  # rows of a block in each half of its bytes
_SIGN = 8  # of E2M1
# Between two numbers of E2M1; a tie goes to the even one of them.
_TIES = tuple(
  (low + high) / 2 if i % 2 == 0 else np.nextafter((low + high) / 2, 0)
  for i, (low, high) in enumerate(
    zip(quantization_lib.E2M1, quantization_lib.E2M1[1:], strict=False)
  )
)
_IN = -2


def pack(codes: Any, fill: int = 0) -> Any:
  """Puts codes of 4 bits two in a byte.

  Args:
    codes: [..., in, out] uint8, 0 to 15.
    fill: the code of rows that the last block lacks.

  Returns:
    [..., bytes, out] uint8, `Codes.rows_of` says how many.
  """
  xp = codes.__array_namespace__()
  *front, rows, columns = codes.shape
  missing = -rows % quantization_lib.BLOCK
  padding = [(0, 0)] * len(front) + [(0, missing), (0, 0)]
  blocks = xp.pad(codes, padding, constant_values=fill)
  blocks = blocks.reshape(*front, -1, 2, _HALF, columns)
  packed = blocks[..., 0, :, :] | blocks[..., 1, :, :] << 4
  return packed.reshape(*front, -1, columns)


def unpack(values: Any) -> Any:
  """Returns the codes that `pack` packed, of whole blocks."""
  xp = values.__array_namespace__()
  *front, _, columns = values.shape
  halves = values.reshape(*front, -1, _HALF, columns)
  codes = xp.stack([halves & 15, halves >> 4], axis=-3)
  return codes.reshape(*front, -1, columns)


def numbers(
  values: Any, codes: str, rows: int, group: int | None, zero: Any = None
) -> Any:
  """Returns what codes stand for, before scales: small numbers, in 8 bits.

  Args:
    values: [..., in, out], or [..., bytes, out] of 4 bits.
    codes: of `quantization.CODES`.
    rows: in.
    group: rows of a group; None: all.
    zero: [..., groups, out] uint8; None: there are none.

  Returns:
    [..., in, out], int8 or what the codes are; of mxfp4, twice what they stand
    for, see `scales`.
  """
  if quantization_lib.CODES[codes].bits == 8:
    return values
  xp = values.__array_namespace__()
  found = unpack(values)[..., :rows, :].astype(np.int8)
  if codes == 'int4':
    if zero is None:
      return found - np.int8(quantization_lib.INT4_ZERO)
    return found - spread(zero, rows, group).astype(np.int8)
  exponent, odd = found >> 1 & 3, found & 1
  twice = xp.where(exponent == 0, odd, (odd | 2) << xp.maximum(exponent - 1, 0))
  return xp.where(found & _SIGN, -twice, twice).astype(np.int8)


def scales(scale: Any, codes: str) -> Any:
  """Returns what `numbers` are multiplied by, float32 [..., groups, out]."""
  if quantization_lib.CODES[codes].scale == 'float32':
    return scale
  xp = scale.__array_namespace__()
  bits = scale.astype(np.uint32) << 23
  # The least exponent has no leading bit. Half, as numbers are twice.
  return xp.where(bits == 0, np.uint32(1 << 22), bits).view(np.float32) * (
    np.float32(0.5)
  )


def spread(of_groups: Any, rows: int, group: int | None) -> Any:
  """Returns [..., in, out] of what groups have, [..., groups, out]."""
  xp = of_groups.__array_namespace__()
  return xp.repeat(of_groups, group or rows, axis=_IN)[..., :rows, :]


def encode(w: Any, codes: str, group: int | None = None) -> tuple[Any, Any]:
  """Rounds a matrix to the nearest codes, by the largest number of each group.

  Args:
    w: [..., in, out], finite.
    codes: of `quantization.CODES`.
    group: rows of a group; None: all.

  Returns:
    The codes, [..., in, out] or [..., bytes, out] of 4 bits, and the scales
    [..., groups, out].
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
  if codes == 'mxfp4':
    # The next power of two.
    bits = scale.view(np.uint32)
    scale = ((bits + np.uint32((1 << 23) - 1)) >> 23).astype(np.uint8)
  exact = scales(scale, codes)
  values = w / spread(exact, rows, group)
  if codes == 'int4':
    values = xp.rint(values) + np.float32(quantization_lib.INT4_ZERO)
    return pack(values.astype(np.uint8), quantization_lib.INT4_ZERO), scale
  if codes == 'mxfp4':
    found = sum(
      (xp.abs(values) > np.float32(2 * tie)).astype(np.uint8) for tie in _TIES
    )
    return pack(found | (values < 0).astype(np.uint8) << 3), scale
  dtype = np.dtype(getattr(ml_dtypes, kind.dtype, kind.dtype))
  if dtype.kind == 'i':
    values = xp.rint(values)
  return values.astype(dtype), scale
