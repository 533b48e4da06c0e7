# SPDX-License-Identifier: Apache-2.0
"""How matrices lie in panels, and what is computed of them, in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np

from pallas_kernels.llvm import COLUMNS
from pallas_kernels.quantized_matmul import operand


def to_panels(w: Any) -> Any:
  """Returns a matrix in panels; see `api.to_panels`."""
  *outer, num_in, num_out = w.shape
  panels = w.reshape(*outer, num_in, num_out // COLUMNS, COLUMNS)
  return panels.swapaxes(-3, -2).reshape(
    *outer, num_out // COLUMNS, num_in * COLUMNS
  )


def in_pairs(values: Any) -> Any:
  """Returns packed codes in another order; see `api.in_pairs`."""
  xp = values.__array_namespace__()
  blocks = values.reshape(
    *values.shape[:-2], -1, operand.HALF, values.shape[-1]
  )
  rows = xp.concatenate([blocks & 15, blocks >> 4], axis=-2)
  pairs = rows[..., ::2, :] | rows[..., 1::2, :] << 4
  return pairs.reshape(values.shape)


def from_pairs(values: Any) -> Any:
  """Returns what `in_pairs` made them of."""
  xp = values.__array_namespace__()
  front, columns = values.shape[:-2], values.shape[-1]
  bytes_ = values.reshape(*front, -1, 1, columns)
  rows = xp.concatenate([bytes_ & 15, bytes_ >> 4], axis=-2)
  rows = rows.reshape(*front, -1, operand.BLOCK, columns)
  both = rows[..., : operand.HALF, :] | rows[..., operand.HALF :, :] << 4
  return both.reshape(values.shape)


def from_panels(panels: Any) -> Any:
  """Returns what `to_panels` made them of."""
  *outer, num_panels, size = panels.shape
  lines = panels.reshape(*outer, num_panels, size // COLUMNS, COLUMNS)
  return lines.swapaxes(-3, -2).reshape(
    *outer, size // COLUMNS, num_panels * COLUMNS
  )


def grouped_matmul(
  x: np.ndarray, panels: np.ndarray, group_sizes: np.ndarray
) -> np.ndarray:
  """Returns the rows that groups have; see `api.grouped_matmul`."""
  ends = np.cumsum(group_sizes)
  rows = np.split(x, ends)[: len(ends)]
  return np.concatenate(
    [
      of_group @ w
      for of_group, w in zip(rows, from_panels(panels), strict=True)
    ]
  )
