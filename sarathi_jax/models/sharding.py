# SPDX-License-Identifier: Apache-2.0
"""Combines the parts of a model that the devices of a mesh compute.

Within `jax.shard_map`, a model's functions see one device's part of the
parameters. They call `Shards` where the parts have to be combined; without axes
it does nothing, and the same functions run the whole model. See Megatron-LM
(arXiv 1909.08053, section 3) for the two sums of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any, TypeVar

from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Value = TypeVar('Value')


@dataclasses.dataclass(frozen=True, slots=True)
class Shards:
  """Names of the mesh's axes; None where there is only one part.

  Attributes:
    tp: the axis that splits heads, MLP columns and the vocabulary.
    pp: the axis that splits layers; both axes split the output matrix.
  """

  tp: str | None = None
  pp: str | None = None

  @property
  def axes(self) -> tuple[str, ...]:
    """The axes that are not None, in the order that splits the vocabulary."""
    return tuple(axis for axis in (self.tp, self.pp) if axis is not None)

  def sum(self, part: Float[Array, 'T D']) -> Float[Array, 'T D']:
    """Returns the sum of all devices' parts, on each device."""
    return part if self.tp is None else lax.psum(part, self.tp)

  def mean(self, part: Float[Array, '*shape']) -> Float[Array, '*shape']:
    """Returns the mean of all devices' values, on each device."""
    return part if self.tp is None else lax.pmean(part, self.tp)

  def once(self, bias: Float[Array, ' D']) -> Float[Array, ' D']:
    """Returns `bias` on the first device, else 0: a sum then has it once."""
    if self.tp is None:
      return bias
    return jnp.where(lax.axis_index(self.tp) == 0, bias, 0)

  def embed(
    self,
    table: Any,
    tokens: Int[Array, ' T'],
  ) -> Float[Array, 'T D']:
    """Returns rows of the embedding; the caller refuses ids outside [0, V).

    Args:
      table: an array [V, D], or a `matrices.Table`.
      tokens: the ids.
    """
    rows_of: Callable[[Array], Array]
    if hasattr(table, 'rows'):
      num, rows_of = table.num_rows, table.rows
    else:
      num = table.shape[0]
      rows_of = functools.partial(jnp.take, table, axis=0, mode='clip')
    if self.tp is None:
      return rows_of(tokens)
    row, is_mine = self.mine(tokens, num)
    return self.sum(jnp.where(is_mine[:, None], rows_of(row), 0))

  def mine(
    self, indices: Int[Array, '*shape'], num: int
  ) -> tuple[Int[Array, '*shape'], Bool[Array, '*shape']]:
    """Returns indices of a device's part, and which of them it has.

    Args:
      indices: of an axis that `tp` splits.
      num: how many of them are each device's.
    """
    assert self.tp is not None
    here = indices - lax.axis_index(self.tp) * num
    return here, (here >= 0) & (here < num)

  def by_stage(
    self,
    values: Sequence[Value],
    compute: Callable[[Value], Any],
  ) -> Any:
    """Returns `compute` of this stage's value; branches only if values differ.

    Args:
      values: one a stage; a single one where there are no stages.
      compute: makes a tree of arrays of a value, of the same shapes for all.
    """
    distinct = list(dict.fromkeys(values))
    if len(distinct) == 1:
      return compute(distinct[0])
    assert self.pp is not None
    which = jnp.array([distinct.index(value) for value in values], jnp.int32)
    return lax.switch(
      which[lax.axis_index(self.pp)],
      [functools.partial(compute, value) for value in distinct],
    )

  def head_rows(self, table: Float[Array, 'V D']) -> Float[Array, 'rows D']:
    """Returns this device's rows of an embedding that is the output, too.

    Every stage has a copy of the embedding, and computes its part of the
    output.
    """
    if self.pp is None:
      return table
    num = table.shape[0] // lax.axis_size(self.pp)
    start = lax.axis_index(self.pp) * num
    return lax.dynamic_slice_in_dim(table, start, num)


WHOLE = Shards()
