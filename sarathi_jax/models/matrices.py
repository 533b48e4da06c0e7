# SPDX-License-Identifier: Apache-2.0
"""Matrices of weights, multiplied the way that suits how they lie in memory.

XLA multiplies x @ W on a CPU in panels of W, which it first copies to where
it can read them: with the few rows of decodes, that is a third of the time.
In W^T @ x^T it copies panels of x^T, which are few, and reads W^T as it lies.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float

# With more rows, the copies are a small part, and those of x^T are not.
_FEW_ROWS = 256


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class Transposed:
  """A matrix [in, out] that lies in memory as [out, in]: a node of params."""

  array: Any


def matmul(x: Float[Array, 'T in'],
           w: Float[Array, 'in out'] | Transposed,
           dtype: Any = None) -> Float[Array, 'T out']:
  """x @ w.

  Args:
    x: rows.
    w: what they are multiplied with.
    dtype: of sums and of what is returned; None: the arguments'.
  """
  if not isinstance(w, Transposed):
    return jnp.matmul(x, w, preferred_element_type=dtype)
  if x.shape[0] > _FEW_ROWS:
    return jnp.matmul(x, w.array.T, preferred_element_type=dtype)
  # Without barriers XLA swaps the operands back.
  columns = lax.optimization_barrier(x.T)
  out = jnp.matmul(w.array, columns, preferred_element_type=dtype)
  return lax.optimization_barrier(out).T
