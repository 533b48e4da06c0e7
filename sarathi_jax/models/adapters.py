# SPDX-License-Identifier: Apache-2.0
"""Adds LoRA adapters to matrices; each row of a batch has its own, or none.

Adapters lie in slots. A matrix W [in, out] has beside it the A of all slots
side by side, [in, slots * rank], and their B below one another,
[slots * rank, out]. A row x gets x @ W + h @ B, where h is x @ A, but 0 in the
columns of all slots but its own. So any mix of adapters is two products of
fixed shapes, and what other rows ask for adds exactly 0. Scales are in B;
lesser ranks end in zeros.

Where matrices are kept side by side (`matrices.SideBySide`), so are their A,
and B has rows for each of them, which are 0 in the columns of the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sarathi_jax.models import matrices

# The matrices that may have adapters, by the names that layers have for them.
TARGETS = ('q', 'k', 'v', 'o', 'gate', 'up', 'down')


@dataclasses.dataclass(frozen=True, slots=True)
class Slots:
  """The room that there is for adapters.

  Attributes:
    num: adapters on the device at once.
    rank: the highest that one of them may have.
  """

  num: int
  rank: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class LowRank:
  """The adapters of a matrix, or of several that are side by side.

  Attributes:
    a: [in, matrices * slots * rank]; or what stands for it in a tree.
    b: [matrices * slots * rank, out].
  """

  a: Any
  b: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class Adapted:
  """A matrix with adapters, as a `matrices.Matrix` multiplies.

  Attributes:
    matrix: an array or a `matrices.Matrix`.
    added: its adapters.
    chosen: of each row one more than its adapter's slot, or 0 for none, int32;
      an array for each number of rows that a layer multiplies.
    slots: the room.
  """

  matrix: Any
  added: LowRank
  chosen: tuple[Any, ...]
  slots: Slots = dataclasses.field(metadata={'static': True})

  def multiply(self, x: Float[Array, 'T in'], dtype: Any) -> Array:
    """Returns x @ w and what its rows' adapters add, in `dtype`."""
    (chosen,) = (rows for rows in self.chosen if rows.shape[0] == x.shape[0])
    inner = jnp.matmul(x, self.added.a, preferred_element_type=jnp.float32)
    of_columns = jnp.arange(inner.shape[1]) // self.slots.rank % self.slots.num
    # Chosen, not multiplied by 0: others' columns may have overflown.
    inner = jnp.where(chosen[:, None] == of_columns[None] + 1, inner, 0)
    added = jnp.matmul(
      inner.astype(x.dtype), self.added.b, preferred_element_type=dtype
    )
    return matrices.matmul(x, self.matrix, dtype) + added


def applied(
  layers: Sequence[Any],
  added: Sequence[Any],
  chosen: tuple[Any, ...],
  slots: Slots,
) -> list[Any]:
  """Returns layers whose matrices have their adapters.

  Args:
    layers: the parameters of each.
    added: the adapters of each: a tree of dicts that ends in `LowRank`, by the
      names of matrices, or of those that are side by side.
    chosen: see `Adapted`.
    slots: the room.
  """

  def one(params: Any, added: Any) -> Any:
    if isinstance(added, Mapping):
      return {
        name: one(inner, added[name]) if name in added else inner
        for name, inner in params.items()
      }
    if isinstance(params, matrices.SideBySide):
      whole = Adapted(params.matrix, added, chosen, slots)
      return dataclasses.replace(params, matrix=whole)
    return Adapted(params, added, chosen, slots)

  return [one(*both) for both in zip(layers, added, strict=True)]
