# SPDX-License-Identifier: Apache-2.0
"""Multiplies by what a CPU's matrices are in panels, numbers or codes."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import panel_matmul


def multiply(
  x: Float[Array, '... T in'],
  panels: Any,
  coded: panel_matmul.Coded | None = None,
) -> Float[Array, '... T out']:
  """Returns x @ w, in float32.

  Args:
    x: rows; with the axes in front that the matrix has, or others if it has
      none.
    panels, coded: the matrix, see `panel_matmul.grouped_matmul`; may have axes
      in front, such as experts'.
  """

  def flat(array: Any) -> Any:
    return array.reshape(-1, *array.shape[-2:])

  panels = flat(panels)
  if coded is not None:
    zero = None if coded.zero is None else flat(coded.zero)
    coded = coded._replace(scale=flat(coded.scale), zero=zero)
  rows = x.reshape(-1, x.shape[-1])
  sizes = jnp.full(len(panels), len(rows) // len(panels), jnp.int32)
  out = multiply_groups(rows, panels, sizes, coded)
  return out.reshape(*x.shape[:-1], -1)


def multiply_groups(
  x: Float[Array, 'R in'],
  panels: Any,
  group_sizes: Int[Array, ' G'],
  coded: panel_matmul.Coded | None = None,
) -> Float[Array, 'R out']:
  """Multiplies rows, group after group, by their groups' matrices.

  Args:
    x, panels, group_sizes, coded: see `panel_matmul.grouped_matmul`; x may be
      of any floats.
  """
  x = x.astype(jnp.float32)
  return panel_matmul.grouped_matmul(x, panels, group_sizes, coded)
