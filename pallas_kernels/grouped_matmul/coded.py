# SPDX-License-Identifier: Apache-2.0
"""Matrices of groups that are kept in codes, as a way to multiply by them."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.quantized_matmul import operand
from pallas_kernels.quantized_matmul import rows
from pallas_kernels.quantized_matmul import xla


@dataclasses.dataclass(frozen=True, slots=True)
class Coded:
  """Multiplies by matrices that are `quantized_matmul.Operand`s.

  Their arrays have G in front. Called, it multiplies by the matrix of one
  group, in JAX's own operations; kernels know what it stands for.

  Attributes:
    codes, group, activations, by_columns: of every kind; see
      `quantized_matmul`.
  """

  codes: str
  group: int | None = None
  activations: str | None = None
  by_columns: bool = False

  def __call__(self, x: jax.Array, w: operand.Operand) -> jax.Array:
    """Multiplies rows [n, in], in float32."""
    if self.by_columns:
      w = w._replace(values=w.values.T)
    given, scale = x, None
    if self.activations is not None:
      given, scale = rows.rounded(x)
      given = given.astype(x.dtype)  # Which holds them exactly.
    out = xla.quantized_matmul(given, w, self.codes, self.group, jnp.float32)
    return out if scale is None else out * scale

  def differentiable(self) -> Coded:
    """Returns what gradients are of: rows as they are."""
    return dataclasses.replace(self, activations=None)

  def check(
    self, matrices: Sequence[Any], num_groups: int, num_in: int
  ) -> None:
    """Raises ValueError if matrices are no such codes; says which and why."""
    for w in matrices:
      if not isinstance(w, operand.Operand):
        raise ValueError(
          f'matrices={type(w).__name__}: must be Operands, as matmul is Coded.'
        )
      operand.check(
        w,
        self.codes,
        num_in,
        self.group,
        (num_groups,),
        by_columns=self.by_columns,
      )
      rows.check(self.activations, self.codes, w.scale.shape[-2])
