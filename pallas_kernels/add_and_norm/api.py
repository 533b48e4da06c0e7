# SPDX-License-Identifier: Apache-2.0
"""The function to call: a sum, and its RMS norm.

Shape letters: T rows, D channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from pallas_kernels.add_and_norm import pallas_triton
from pallas_kernels.add_and_norm import reference
from pallas_kernels.add_and_norm import tuning
from pallas_kernels.add_and_norm import xla
from pallas_kernels.ragged_paged_attention import validate

Added = tuple[jax.Array, jax.Array]

IMPLEMENTATIONS: Mapping[str, Callable[..., Added]] = {
  'reference': reference.add_and_norm,
  'xla': xla.add_and_norm,
  'pallas_triton': pallas_triton.add_and_norm,
}


def add_and_norm(
  x: jax.Array,
  out: jax.Array,
  weight: jax.Array,
  *,
  eps: float,
  offset: int = 0,
  implementation: str | None = None,
) -> Added:
  """Adds, and divides each row of the sum by its root mean square.

  The sum is rounded to its dtype, as it is kept; what is normalized is that
  number. The norm is in float32, is multiplied by `offset` + `weight`, and then
  rounded.

  Worked example: x=[[1, 2]], out=[[2, 2]], weight=[1, 2], eps=0. The sum is
  [[3, 4]], its root mean square sqrt(12.5), its norm [[0.849, 2.263]].

  Args:
    x: [T, D], any float.
    out: [T, D], of x's dtype; what is added.
    weight: [D], any float.
    eps: added to the mean square.
    offset: added to `weight`.
    implementation: a key of `IMPLEMENTATIONS`; None: the fastest here.
      `pallas_triton` takes one launch, and reads either array once.

  Returns:
    The sum and its norm, [T, D] of x's dtype each.

  Raises:
    ValueError: shapes or dtypes don't fit; says which and why.
    NotImplementedError: the implementation can't run here.
  """
  if implementation is None:
    implementation = tuning.fastest()
  check = validate.check
  check(
    implementation in IMPLEMENTATIONS,
    'implementation',
    implementation,
    f'must be None or one of {", ".join(IMPLEMENTATIONS)}',
  )
  check(x.ndim == 2, 'x', x.shape, 'must have 2 axes')
  for name, array in (('x', x), ('weight', weight)):
    check(
      jnp.issubdtype(array.dtype, jnp.floating),
      name,
      array.dtype,
      'must be a float',
    )
  check(
    (out.shape, out.dtype) == (x.shape, x.dtype),
    'out',
    f'{out.dtype}{out.shape}',
    f'must be as x, {x.dtype}{x.shape}',
  )
  shape = x.shape[1:]
  check(weight.shape == shape, 'weight', weight.shape, f'must be {shape}')
  return IMPLEMENTATIONS[implementation](x, out, weight, eps, offset)
