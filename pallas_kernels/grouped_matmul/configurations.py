# SPDX-License-Identifier: Apache-2.0
"""The default configurations, to compile for GPUs."""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul import arg_specs
from pallas_kernels.grouped_matmul import grouping_triton
from pallas_kernels.grouped_matmul import pallas_triton


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
  """Something to compile for a GPU; a `pallas_kernels.aot.cases.Case`.

  Attributes:
    name: for people.
    spec: of the tokens, and of the matrices.
    kinds: of matrices; two are a gate and what it gates.
    dtype: of all.
    biases: whether there is one of each kind.
  """

  name: str
  spec: arg_specs.ArgSpec
  kinds: int
  dtype: str = 'bfloat16'
  biases: bool = False

  def function(
    self, x: jax.Array, sizes: jax.Array, rows: jax.Array, *more: jax.Array
  ) -> jax.Array:
    return pallas_triton.grouped_matmul(
      x,
      more[: self.kinds],
      sizes,
      rows,
      _gated if self.kinds == 2 else _only,
      biases=more[self.kinds :],
    )

  @property
  def args(self) -> Any:
    spec = self.spec
    rows = spec.num_tokens * spec.chosen
    matrix = jax.ShapeDtypeStruct(
      (spec.num_groups, spec.num_in, spec.num_out), jnp.dtype(self.dtype)
    )
    return (
      jax.ShapeDtypeStruct(
        # What is computed of a token in one launch is a row in the next.
        (spec.num_tokens if self.kinds == 2 else rows, spec.num_in),
        jnp.dtype(self.dtype),
      ),
      jax.ShapeDtypeStruct((spec.num_groups,), jnp.int32),
      jax.ShapeDtypeStruct((rows,), jnp.int32),
      *[matrix] * self.kinds,
      *[
        jax.ShapeDtypeStruct((spec.num_groups, spec.num_out), matrix.dtype)
        for _ in range(self.kinds if self.biases else 0)
      ],
    )


@dataclasses.dataclass(frozen=True, slots=True)
class GroupingCase:
  """The same of sorting rows by groups.

  Attributes:
    num_rows, num_groups: R, G.
  """

  num_rows: int
  num_groups: int

  @property
  def name(self) -> str:
    return f'group {self.num_rows} by {self.num_groups}'

  def function(self, keys: jax.Array) -> Any:
    return grouping_triton.sort(keys, self.num_groups)

  @property
  def args(self) -> Any:
    return (jax.ShapeDtypeStruct((self.num_rows,), jnp.int32),)


def _only(product: jax.Array) -> jax.Array:
  return product


def _gated(gate: jax.Array, up: jax.Array) -> jax.Array:
  return jax.nn.silu(gate) * up


def cases(device: str) -> Iterator[Case | GroupingCase]:
  """Yields every default configuration, for `pallas_kernels.aot`.

  Iterate, and compile, while the default device is the one of this name.
  """
  del device  # All have the same.
  for num_groups, chosen in sorted({m[:2] for m in arg_specs.MODELS.values()}):
    for num_tokens in arg_specs.TOKENS:
      yield GroupingCase(num_tokens * chosen, num_groups)
  for model, (num_groups, chosen, width, inner) in arg_specs.MODELS.items():
    for num_tokens in arg_specs.TOKENS:
      for kinds, sizes in ((2, (width, inner)), (1, (inner, width))):
        spec = arg_specs.ArgSpec(num_tokens, num_groups, chosen, *sizes)
        name = (
          f'experts {model} {num_tokens} {"gated" if kinds == 2 else "out"}'
        )
        yield Case(name, spec, kinds, biases=model == 'gpt-oss-20b')
        if num_tokens == 64 and model == 'mixtral-8x7b':
          for dtype in ('float16', 'float32'):
            yield Case(f'{name} {dtype}', spec, kinds, dtype)
