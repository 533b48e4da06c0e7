# SPDX-License-Identifier: Apache-2.0
"""Describes parameters before they exist. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses

# Matrices that multiply the same rows, and the name of all of them where they
# are kept as one (`matrices.SideBySide`). So are then their biases, `qkv_bias`.
GROUPS: Mapping[str, tuple[str, ...]] = {
  'qkv': ('q', 'k', 'v'),
  'gate_up': ('gate', 'up'),
}


@dataclasses.dataclass(frozen=True, slots=True)
class ParamSpec:
  """One leaf of `params`.

  Attributes:
    shape: numbers along each axis.
    axes: a name for each axis, or None: 'vocab', 'logits' (V of the output
      matrix), 'embed', 'heads' (H * h, whole heads one after another, or H),
      'kv_heads' (K * h), 'mlp', 'experts', or 'whole_experts' where devices
      share these. Sharding is defined by these.
    init: how to draw it at random: 'normal' and 'bias' around 0, 'scale'
      around 1.
    dtype: what it is always kept in; None: in what the model computes in.
  """

  shape: tuple[int, ...]
  axes: tuple[str | None, ...]
  init: str = 'normal'
  dtype: str | None = None

  @property
  def is_factor(self) -> bool:
    """Whether rows are multiplied by it: it is no vector, and no table."""
    return (
      len(self.shape) > 1
      and not self.is_table
      and self.init != 'bias'
      and self.dtype is None
    )

  @property
  def is_table(self) -> bool:
    """Whether tokens have a row of it each."""
    return self.axes[0] == 'vocab'

  @property
  def is_of_experts(self) -> bool:
    """Whether it has a matrix for each expert."""
    return self.axes[0] in ('experts', 'whole_experts')


def matrix(rows: tuple[str, int], columns: tuple[str, int]) -> ParamSpec:
  """Returns the spec of a matrix [in, out]; each axis is (name, size)."""
  return ParamSpec((rows[1], columns[1]), (rows[0], columns[0]))


def bias(axis: tuple[str | None, int], dtype: str | None = None) -> ParamSpec:
  """Returns the spec of a vector that is added."""
  return ParamSpec((axis[1],), (axis[0],), 'bias', dtype)


def scale(size: int, axis: str | None = 'embed') -> ParamSpec:
  """Returns the spec of a vector that a normalized one is multiplied by."""
  return ParamSpec((size,), (axis,), 'scale')
