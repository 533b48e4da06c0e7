# SPDX-License-Identifier: Apache-2.0
"""The definition: the matrix in float32, and rows multiplied by it."""

from __future__ import annotations

import jax
from jax import lax
import jax.numpy as jnp

from pallas_kernels.quantized_matmul import operand


def quantized_matmul(
  x: jax.Array,
  w: operand.Operand,
  codes: str,
  group: int | None,
  dtype: jax.typing.DTypeLike,
) -> jax.Array:
  """Multiplies rows by a matrix in codes; see `api.quantized_matmul`."""
  rows = x.shape[1]
  found = operand.numbers(w, codes, rows, group).astype(jnp.float32)
  scale = operand.spread(operand.scales(w.scale), rows, group)
  return jnp.matmul(
    x.astype(jnp.float32), found * scale, precision=lax.Precision.HIGHEST
  ).astype(dtype)
