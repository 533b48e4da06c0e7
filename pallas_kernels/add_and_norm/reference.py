# SPDX-License-Identifier: Apache-2.0
"""The definition: a loop over rows in NumPy. Not to be jitted."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def add_and_norm(
  x: Any, out: Any, weight: Any, eps: float, offset: int = 0
) -> tuple[jax.Array, jax.Array]:
  """Adds and normalizes; see `api.add_and_norm`."""
  x, out, weight = (np.asarray(array) for array in (x, out, weight))
  factors = offset + weight.astype(np.float64)
  total, normed = np.empty_like(x), np.empty_like(x)
  for row in range(len(x)):
    total[row] = x[row].astype(np.float64) + out[row].astype(np.float64)
    exact = total[row].astype(np.float64)
    root = np.sqrt(np.mean(np.square(exact)) + eps)
    normed[row] = exact / root * factors
  return jnp.asarray(total), jnp.asarray(normed)
