# SPDX-License-Identifier: Apache-2.0
"""The definition: sorts each row, and sums in float64. Not to be jitted."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def least_kept(logits: Any, top_k: Any, top_p: Any) -> jax.Array:
  """Finds the least logits that are kept; see `api.least_kept`."""
  rows = zip(*map(np.asarray, (logits, top_k, top_p)), strict=True)
  found = [least_of_row(x, int(k), float(p))[0] for x, k, p in rows]
  return jnp.asarray(found, jnp.float32)


def least_of_row(
  x: np.ndarray, top_k: int, top_p: float
) -> tuple[float, float]:
  """Finds a row's least logit that is kept.

  Args:
    x: [V] float32.
    top_k, top_p: the row's.

  Returns:
    It, and by how much of a probability top_p decided so, at the least.
  """
  never, all_kept = -np.inf, (-np.inf, 1.0)
  descending = np.sort(x.astype(np.float64))[::-1]
  if descending[0] == never:
    return all_kept
  least = descending[top_k - 1] if 0 < top_k <= len(x) else never
  if top_p >= 1:
    return least, 1.0
  kept = descending[descending >= least]
  # Of equal ones, the last has all of them summed up before it.
  ends = np.flatnonzero(np.append(kept[1:] != kept[:-1], True))
  sums = np.cumsum(np.exp(kept))[ends]
  sums /= sums[-1]
  margin = float(np.abs(sums[:-1] - top_p).min(initial=1.0))
  return kept[ends[np.argmax(sums >= top_p)]], margin
