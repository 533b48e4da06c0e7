# SPDX-License-Identifier: Apache-2.0
"""Rows as data, for tests, the compiler and measurements."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, slots=True)
class ArgSpec:
  """Rows, of which `make` draws the arguments of the operation.

  Attributes:
    num_rows, width: T, D.
    dtype: of rows.
    weight_dtype: of the weight; None: `dtype`.
    offset: added to the weight.
  """

  num_rows: int = 5
  width: int = 64
  dtype: str = 'float32'
  weight_dtype: str | None = None
  offset: int = 0


# What tests compare, by what is special of it.
TESTS: Mapping[str, ArgSpec] = {
  'plain': ArgSpec(),
  'a row': ArgSpec(num_rows=1),
  'pieces': ArgSpec(width=2880),
  'odd': ArgSpec(width=37),
  'from one': ArgSpec(offset=1),
  'bfloat16': ArgSpec(dtype='bfloat16', width=96),
  'float16': ArgSpec(dtype='float16'),
  'bfloat16, weights of float32': ArgSpec(
    dtype='bfloat16', weight_dtype='float32'
  ),
}


def make(spec: ArgSpec, seed: int = 0) -> dict[str, Any]:
  """Draws the arguments of `api.add_and_norm`, by name.

  A row is small against `eps`, the last is 0; all others are of their own size.
  """
  rng = np.random.default_rng(seed)
  shape = spec.num_rows, spec.width
  sizes = np.geomspace(1e-4, 10, spec.num_rows)[:, None]
  x, out = sizes * rng.standard_normal((2, *shape))
  x[1:][-1:] = out[1:][-1:] = 0
  return {
    'x': jnp.asarray(x, spec.dtype),
    'out': jnp.asarray(out, spec.dtype),
    'weight': jnp.asarray(
      rng.uniform(0.5, 2, spec.width), spec.weight_dtype or spec.dtype
    ),
    'eps': 1e-5,
    'offset': spec.offset,
  }
