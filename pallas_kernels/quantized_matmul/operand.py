# SPDX-License-Identifier: Apache-2.0
"""The matrix in codes, and what its codes stand for.

A matrix [in, out] is codes, and scales [groups, out]: a number is what its code
stands for, times the scale that its column has for its group of rows.

| codes | kept as | a code stands for |
|---|---|---|
| int8 | int8 [in, out] | itself |
| fp8 | float8_e4m3fn [in, out] | itself |
| int4 | uint8 [bytes, out] | the code less 8, or less its group's zero |
| mxfp4 | uint8 [bytes, out] | a number of E2M1 |

Codes of 4 bits lie two in a byte, in blocks of 32 rows: byte i of a block's 16
has row i in its low half, and row 16 + i in its high one. So each half of some
bytes has rows that lie together, as products of a GPU take them. Rows that the
last block has beyond `in` are multiplied by nothing.
"""

# `sarathi_jax.models.codes` says it, too, for who loads no JAX: converters and
# plans. There E2M1's numbers are doubled, to stay in 8 bits, and their scales
# halved, which a kernel could not share, as it has instructions of its own for
# both. `tests/models/quantized_test.py` holds the two to the same numbers.

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

BLOCK = 32  # rows whose codes of 4 bits are packed together
HALF = BLOCK // 2
INT4_ZERO = 8  # the code of 0, where there are no zeros


class Codes(NamedTuple):
  """A way to write numbers.

  Attributes:
    dtype: of an array of them.
    bits: of a number.
    scale: the dtype of scales; uint8 stands for 2 ** (scale - 127).
  """

  dtype: str
  bits: int
  scale: str = 'float32'


CODES: Mapping[str, Codes] = {
  'int8': Codes('int8', 8),
  'fp8': Codes('float8_e4m3fn', 8),
  'int4': Codes('uint8', 4),
  'mxfp4': Codes('uint8', 4, 'uint8'),
}


class Operand(NamedTuple):
  """The arrays of a matrix, of jax or NumPy; or what stands for them.

  Attributes:
    values: the codes.
    scale: [groups, out], of the dtype that `Codes.scale` says.
    zero: [groups, out] uint8, the codes of 0 of int4; None: they are 8.
  """

  values: Any
  scale: Any
  zero: Any = None


def check(
  w: Operand,
  codes: str,
  rows: int,
  group: int | None,
  front: tuple[int, ...] = (),
  by_columns: bool = False,
) -> None:
  """Raises ValueError if arrays don't fit; says which and why.

  Args:
    w, codes, rows, group: see `numbers`.
    front: the lengths of the axes that all arrays have in front.
    by_columns: whether values are [out, in], which those of 8 bits may be.
  """
  if codes not in CODES:
    raise ValueError(f'{codes=}: must be one of {", ".join(CODES)}.')
  kind, columns = CODES[codes], w.values.shape[-2 if by_columns else -1]
  if by_columns and kind.bits != 8:
    raise ValueError(f'by_columns=True: must be False with {codes}.')
  kept = rows if kind.bits == 8 else HALF * -(-rows // BLOCK)
  groups = 1 if group is None else -(-rows // group)
  expected = [
    (
      'values',
      w.values,
      kind.dtype,
      (*front, *((columns, kept) if by_columns else (kept, columns))),
    ),
    ('scale', w.scale, kind.scale, (*front, groups, columns)),
  ]
  if w.zero is not None:
    if codes != 'int4':
      raise ValueError(f'zero={w.zero.shape}: must be None with {codes}.')
    expected.append(('zero', w.zero, 'uint8', (*front, groups, columns)))
  for name, array, dtype, shape in expected:
    if array.shape != shape or array.dtype.name != dtype:
      raise ValueError(
        f'{name}={array.dtype}{array.shape}: must be {dtype}{shape}.'
      )


def numbers(w: Operand, codes: str, rows: int, group: int | None) -> jax.Array:
  """Returns what codes stand for, [in, out], in a dtype of 8 bits or float32.

  Args:
    w: the matrix.
    codes: of `CODES`.
    rows: in.
    group: rows of a group; None: all.
  """
  if CODES[codes].bits == 8:
    values: jax.Array = w.values
    return values
  halves = w.values.reshape(-1, 1, HALF, w.values.shape[-1])
  both = jnp.concatenate([halves & 15, halves >> 4], axis=1)
  found: jax.Array = both.reshape(-1, w.values.shape[-1])[:rows]
  found = found.astype(jnp.int8)
  if codes == 'mxfp4':
    return e2m1(found, jnp.float32)
  if w.zero is None:
    return found - jnp.int8(INT4_ZERO)
  return found - spread(w.zero, rows, group).astype(jnp.int8)


def e2m1(codes: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
  """Returns the numbers of E2M1, codes 0 to 15, exactly: seem."""
  codes = codes.astype(jnp.int32)
  exponent, mantissa = codes >> 1 & 3, codes & 1
  twice = jnp.where(
    exponent == 0, mantissa, (2 | mantissa) << jnp.maximum(exponent - 1, 0)
  )
  signed = jnp.where(codes & 8 != 0, -0.5, 0.5)
  return (twice.astype(jnp.float32) * signed).astype(dtype)


def scales(scale: jax.Array) -> jax.Array:
  """Returns scales as float32, however they are kept."""
  if scale.dtype == jnp.float32:
    return scale
  bits = scale.astype(jnp.int32) << 23
  # 2**-127 has no leading bit.
  return lax.bitcast_convert_type(
    jnp.where(bits == 0, 1 << 22, bits), jnp.float32
  )


def powers(scale: jax.Array) -> jax.Array:
  """Returns scales of uint8 as bfloat16, which has all float32's exponents."""
  bits = scale.astype(jnp.uint16) << 7
  return lax.bitcast_convert_type(
    jnp.where(scale == 0, jnp.uint16(1 << 6), bits), jnp.bfloat16
  )


def spread(of_groups: jax.Array, rows: int, group: int | None) -> jax.Array:
  """Returns [in, out] of what groups have, [groups, out]."""
  return jnp.repeat(of_groups, group or rows, axis=0)[:rows]
