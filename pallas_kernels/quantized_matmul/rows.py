# SPDX-License-Identifier: Apache-2.0
"""Rounds the rows that a matrix multiplies to 8 bits, as they come.

Each row has a scale of its own, which its largest number makes the largest
code. So what a row is rounded to depends on no other row, nor on anything that
was measured before.
"""

from __future__ import annotations

import jax
from jax import lax
import jax.numpy as jnp

# What rows may be rounded to, and then be multiplied by the same.
CODES = ('fp8',)
_DTYPE = jnp.float8_e4m3fn
_MOST = float(jnp.finfo(_DTYPE).max)
_LEAST_NORMAL = float(jnp.finfo(_DTYPE).tiny)
_LEAST = float(jnp.finfo(_DTYPE).smallest_subnormal)
_LEAST_SCALE = 2.0**-126  # float32's: a row of zeros has one, too


def rounded(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Rounds rows to the nearest numbers of e4m3.

  Worked example: [[1, -2]] -> [[224, -448]], [[2 / 448]].

  Args:
    x: [T, in], of floats.

  Returns:
    float8_e4m3fn [T, in], and what these are to be multiplied by, float32
    [T, 1]. A row with a number that is not finite is NaN, in whole or in part.
  """
  x = x.astype(jnp.float32)
  most = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
  scale = jnp.maximum(most / _MOST, _LEAST_SCALE)
  x = x / scale
  # By itself, XLA rounds twice on CPUs: to float16 first.
  nearest = jnp.where(
    jnp.abs(x) < _LEAST_NORMAL,
    jnp.rint(x / _LEAST) * _LEAST,
    lax.reduce_precision(x, 8, jnp.finfo(_DTYPE).nmant),
  )
  return nearest.astype(_DTYPE), scale


def check(activations: str | None, codes: str, groups: int) -> None:
  """Raises ValueError if a matrix does not multiply such rows; says why.

  Args:
    activations: what rows are rounded to; None: they are not.
    codes: of the matrix, of `operand.CODES`.
    groups: that its rows are in.
  """
  if activations not in (None, *CODES):
    raise ValueError(
      f'{activations=}: must be None or one of {", ".join(CODES)}.'
    )
  if activations is not None and (codes != activations or groups > 1):
    raise ValueError(
      f'{activations=}: needs the same codes, and a group of all rows; '
      f'{codes=}, {groups=}.'
    )
