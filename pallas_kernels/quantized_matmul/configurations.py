# SPDX-License-Identifier: Apache-2.0
"""The default configurations, to compile for GPUs."""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.quantized_matmul import arg_specs
from pallas_kernels.quantized_matmul import operand
from pallas_kernels.quantized_matmul import pallas_triton


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
  """Something to compile for a GPU; a `pallas_kernels.aot.cases.Case`.

  Attributes:
    name: for people.
    spec: of the rows and the matrix.
    dtype: of the rows.
  """

  name: str
  spec: arg_specs.ArgSpec
  dtype: str = 'bfloat16'

  def function(self, x: jax.Array, w: operand.Operand) -> jax.Array:
    spec = self.spec
    return pallas_triton.quantized_matmul(
      x, w, spec.codes, spec.group, jnp.dtype(self.dtype)
    )

  @property
  def args(self) -> Any:
    x = self.spec.num_tokens, self.spec.num_in
    return (
      jax.ShapeDtypeStruct(x, jnp.dtype(self.dtype)),
      arg_specs.shapes(self.spec),
    )


def case(
  model: str, matrix: str, kind: str, num_tokens: int, dtype: str = 'bfloat16'
) -> Case:
  """Returns the case of a model's matrix; see `arg_specs`."""
  sizes = arg_specs.MODELS[model][matrix]
  codes, group, has_zero = arg_specs.KINDS[kind]
  spec = arg_specs.ArgSpec(num_tokens, *sizes, codes, group, has_zero)
  name = f'weights {kind} {model} {matrix} {num_tokens}'
  if dtype != 'bfloat16':
    name += f' {dtype}'
  return Case(name, spec, dtype)


# Of these all ways are compiled: tiles of the one are narrow, of the other not.
_WHOLE = ('llama-3.1-8b', 'o'), ('llama-3.1-8b', 'gate_up')


def cases(device: str) -> Iterator[Case]:
  """Yields every default configuration, for `pallas_kernels.aot`.

  Iterate, and compile, while the default device is the one of this name.
  """
  del device  # All have the same.
  for model, matrices in arg_specs.MODELS.items():
    for matrix in matrices:
      for kind in arg_specs.KINDS:
        for num_tokens in arg_specs.TOKENS:
          # Of the others what is most used: sizes make no other kernel.
          if (model, matrix) in _WHOLE or (
            kind in ('int8', 'int4-128') and num_tokens in (16, 512)
          ):
            yield case(model, matrix, kind, num_tokens)
  for dtype in ('float16', 'float32'):
    for kind in ('int8', 'fp8', 'int4-128-zero', 'mxfp4'):
      yield case('llama-3.1-8b', 'o', kind, 16, dtype)
