# SPDX-License-Identifier: Apache-2.0
"""What one device of a mesh does so that all together compute a model.

Within `jax.shard_map`, a model's functions see one device's part of the
parameters. `Shards` is what they call where the parts have to meet; without
axes it does nothing, and the same functions run the whole model. See
Megatron-LM (arXiv 1909.08053, section 3) for the two sums of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any, TypeVar

from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Value = TypeVar('Value')


@dataclasses.dataclass(frozen=True, slots=True)
class Shards:
  """Names of the mesh's axes; None where there is but one part.

  Attributes:
    tp: over which heads, MLP columns and the vocabulary are split.
    pp: over which layers are; the output matrix is split over both.
  """

  tp: str | None = None
  pp: str | None = None

  @property
  def axes(self) -> tuple[str, ...]:
    """Those there are, in the order in which the vocabulary is cut."""
    return tuple(axis for axis in (self.tp, self.pp) if axis is not None)

  def sum(self, part: Float[Array, 'T D']) -> Float[Array, 'T D']:
    """The sum of all devices' parts, on each."""
    return part if self.tp is None else lax.psum(part, self.tp)

  def once(self, bias: Float[Array, ' D']) -> Float[Array, ' D']:
    """What is to be in a sum of parts once: on the first device only."""
    if self.tp is None:
      return bias
    return jnp.where(lax.axis_index(self.tp) == 0, bias, 0)

  def embed(self, table: Float[Array, 'V D'], tokens: Int[Array, ' T'],
            ) -> Float[Array, 'T D']:
    """Rows of the embedding. Ids outside [0, V) are the caller's to refuse."""
    if self.tp is None:
      return jnp.take(table, tokens, axis=0, mode='clip')
    row = tokens - lax.axis_index(self.tp) * table.shape[0]
    is_mine = (row >= 0) & (row < table.shape[0])
    rows = jnp.take(table, row, axis=0, mode='clip')
    return self.sum(jnp.where(is_mine[:, None], rows, 0))

  def by_stage(self, values: Sequence[Value], compute: Callable[[Value], Any],
               ) -> Any:
    """`compute` of this stage's value; a branch only where they differ.

    Args:
      values: one a stage; one, too, where there are no stages.
      compute: makes arrays of one of them, of the same shapes of all.
    """
    distinct = list(dict.fromkeys(values))
    if len(distinct) == 1:
      return compute(distinct[0])
    assert self.pp is not None
    which = jnp.array([distinct.index(value) for value in values], jnp.int32)
    return lax.switch(which[lax.axis_index(self.pp)], [
      functools.partial(compute, value) for value in distinct])

  def head_rows(self, table: Float[Array, 'V D']) -> Float[Array, 'rows D']:
    """Of an embedding that is the output matrix, too: this device's part.

    Stages have copies of the embedding, and of the output a part each.
    """
    if self.pp is None:
      return table
    num = table.shape[0] // lax.axis_size(self.pp)
    start = lax.axis_index(self.pp) * num
    return lax.dynamic_slice_in_dim(table, start, num)


WHOLE = Shards()
