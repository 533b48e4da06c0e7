# SPDX-License-Identifier: Apache-2.0
"""Multiplies by matrices of weights the way that suits their layout in memory.

On a CPU, XLA multiplies x @ W in panels of W, which it first copies to be able
to read them: with the few rows of decodes, that takes a third of the time. In
W^T @ x^T it copies panels of x^T, which are few, and reads W^T in place.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float

# With more rows, copies of W take a small part of the time, and copies of x^T
# a large one.
_FEW_ROWS = 256


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class Transposed:
  """A matrix [in, out] that is kept as an array [out, in]: a node of params.

  Attributes:
    array: [out, in]; or what stands for it in a tree, such as a spec.
  """

  array: Any


def matmul(
  x: Float[Array, 'T in'],
  w: Float[Array, 'in out'] | Transposed,
  dtype: Any = None,
) -> Float[Array, 'T out']:
  """Returns x @ w.

  Args:
    x: rows.
    w: the matrix.
    dtype: of the sums and the result; None: the arguments'.
  """
  if not isinstance(w, Transposed):
    return jnp.matmul(x, w, preferred_element_type=dtype)
  if x.shape[0] > _FEW_ROWS:
    return jnp.matmul(x, w.array.T, preferred_element_type=dtype)
  # Without barriers XLA swaps the operands back.
  columns = lax.optimization_barrier(x.T)
  out = jnp.matmul(w.array, columns, preferred_element_type=dtype)
  return lax.optimization_barrier(out).T
