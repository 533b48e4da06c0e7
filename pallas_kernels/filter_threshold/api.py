# SPDX-License-Identifier: Apache-2.0
"""The function to call: the threshold of the filters top-k and top-p.

Shape letters: S rows, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from pallas_kernels.filter_threshold import pallas_triton
from pallas_kernels.filter_threshold import reference
from pallas_kernels.filter_threshold import tuning
from pallas_kernels.filter_threshold import xla

IMPLEMENTATIONS: Mapping[str, Callable[..., jax.Array]] = {
  'reference': reference.least_kept,
  'xla': xla.least_kept,
  'pallas_triton': pallas_triton.least_kept,
}


def least_kept(
  logits: jax.Array,
  top_k: jax.Array,
  top_p: jax.Array,
  *,
  implementation: str | None = None,
) -> jax.Array:
  """Finds the least logit that each row's filters keep.

  A row keeps its `top_k` largest logits, and of these the largest ones whose
  probabilities, softmax over these, make up `top_p`. What equals the least one
  that is kept is kept, too. So a row keeps the logits that are at least the
  number that is returned.

  Worked example: logits = [-1, 0, -3, -1, -2], top_k=4, top_p=0.8. All but -3
  are kept by top_k; their probabilities are 0.197, 0.534, 0.197 and 0.072. The
  least kept is -1, as 0.534 are not enough, and 0.928 are.

  Args:
    logits: [S, V] float32, of which a row's largest is 0, and minus infinity is
      never sampled; or a row has nothing but minus infinity. No NaN.
    top_k: [S] int32; 0 for all.
    top_p: [S] float32, in [0, 1]; 1 for all. Keeps a logit at least.
    implementation: a key of `IMPLEMENTATIONS`; None: the fastest here.

  Returns:
    [S] float32; minus infinity where all are kept. Implementations may sum
    probabilities in other orders, so where top_p is within rounding of a sum,
    they may keep more or less of what hardly counts; of top_k, all keep the
    same.

  Raises:
    ValueError: shapes or dtypes don't fit; says which and why.
    NotImplementedError: the implementation can't run here.
  """
  if implementation is None:
    implementation = tuning.fastest()
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f'{implementation=}: must be None or one of {", ".join(IMPLEMENTATIONS)}.'
    )
  _check(logits.ndim == 2, 'logits', logits.shape, 'must have 2 axes')
  rows = logits.shape[:1]
  for name, x, shape, dtype in (
    ('logits', logits, logits.shape, jnp.float32),
    ('top_k', top_k, rows, jnp.int32),
    ('top_p', top_p, rows, jnp.float32),
  ):
    _check(
      x.shape == shape and x.dtype == dtype,
      name,
      f'{x.dtype}{x.shape}',
      f'must be {jnp.dtype(dtype)}{shape}',
    )
  _check(logits.shape[1] > 0, 'logits', logits.shape, 'must have a token')
  return IMPLEMENTATIONS[implementation](logits, top_k, top_p)


def _check(ok: bool, name: str, value: object, rule: str) -> None:
  if not ok:
    raise ValueError(f'{name}={value}: {rule}.')
