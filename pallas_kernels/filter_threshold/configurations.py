# SPDX-License-Identifier: Apache-2.0
"""The default configurations, to compile for GPUs."""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.filter_threshold import arg_specs
from pallas_kernels.filter_threshold import pallas_triton


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
  """Something to compile for a GPU; a `pallas_kernels.aot.cases.Case`.

  Attributes:
    num_rows, vocab_size: S, V.
  """

  num_rows: int
  vocab_size: int

  @property
  def name(self) -> str:
    return f'filter {self.num_rows} x {self.vocab_size}'

  def function(self, *args: jax.Array) -> jax.Array:
    return pallas_triton.least_kept(*args)

  @property
  def args(self) -> Any:
    rows = (self.num_rows,)
    return (
      jax.ShapeDtypeStruct((*rows, self.vocab_size), jnp.float32),
      jax.ShapeDtypeStruct(rows, jnp.int32),
      jax.ShapeDtypeStruct(rows, jnp.float32),
    )


def cases(device: str) -> Iterator[Case]:
  """Yields every default configuration, for `pallas_kernels.aot`.

  Iterate, and compile, while the default device is the one of this name.
  """
  del device  # All have the same.
  for num_rows, vocab_size in arg_specs.SHAPES:
    yield Case(num_rows, vocab_size)
