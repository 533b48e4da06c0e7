# SPDX-License-Identifier: Apache-2.0
"""What a parameter looks like before there is one. Standard library only."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class ParamSpec:
  """One leaf of `params`.

  Attributes:
    shape: numbers along each axis.
    axes: a name for each, or None: 'vocab', 'logits' (V of the output
      matrix), 'embed', 'heads' (H * h, whole heads one after another),
      'kv_heads' (K * h), 'mlp', 'experts'. Sharding is said in terms of
      these.
    init: how to draw it at random: 'normal' around 0, 'scale' around 1,
      'bias' closely around 0.
  """

  shape: tuple[int, ...]
  axes: tuple[str | None, ...]
  init: str = 'normal'

  @property
  def is_factor(self) -> bool:
    """Whether rows are multiplied with it: one matrix, not looked up in."""
    return len(self.shape) == 2 and self.axes[0] != 'vocab'


def matrix(rows: tuple[str, int], columns: tuple[str, int]) -> ParamSpec:
  """A matrix [in, out], each axis given as (name, size)."""
  return ParamSpec((rows[1], columns[1]), (rows[0], columns[0]))


def bias(axis: tuple[str, int]) -> ParamSpec:
  """A vector that is added."""
  return ParamSpec((axis[1],), (axis[0],), 'bias')


def scale(size: int, axis: str | None = 'embed') -> ParamSpec:
  """A vector that a normalized one is multiplied with."""
  return ParamSpec((size,), (axis,), 'scale')
