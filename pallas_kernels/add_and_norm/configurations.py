# SPDX-License-Identifier: Apache-2.0
"""The default configurations, to compile for GPUs."""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
from typing import Any

import jax

from pallas_kernels.add_and_norm import pallas_triton

# Channels of models, few and many, and what is no power of two.
_WIDTHS = 576, 2048, 2880, 4096, 5120, 8192, 16384


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
  """Something to compile for a GPU; a `pallas_kernels.aot.cases.Case`.

  Attributes:
    width: D.
    dtype: of rows and weight.
    offset: added to the weight.
  """

  width: int
  dtype: str = 'bfloat16'
  offset: int = 0

  @property
  def name(self) -> str:
    from_one = ', from one' * self.offset
    return f'add and norm {self.width} {self.dtype}{from_one}'

  def function(self, x: jax.Array, out: jax.Array, weight: jax.Array) -> Any:
    return pallas_triton.add_and_norm(x, out, weight, 1e-5, self.offset)

  @property
  def args(self) -> Any:
    rows = jax.ShapeDtypeStruct((64, self.width), self.dtype)
    return rows, rows, jax.ShapeDtypeStruct((self.width,), self.dtype)


def cases(device: str) -> Iterator[Case]:
  """Yields every default configuration, for `pallas_kernels.aot`."""
  del device  # All have the same.
  for width in _WIDTHS:
    yield Case(width)
  yield Case(4096, 'float16')
  yield Case(4096, 'float32')
  yield Case(4096, offset=1)
