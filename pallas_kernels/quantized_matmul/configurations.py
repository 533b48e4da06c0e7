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
from pallas_kernels.quantized_matmul import tuning

_ROUNDED = 'float8_e4m3fn'  # the dtype of rows that are rounded


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
  """Something to compile for a GPU; a `pallas_kernels.aot.cases.Case`.

  Attributes:
    name: for people.
    spec: of the rows and the matrix.
    dtype: of the rows. With float8_e4m3fn, they have scales, and the result is
      of bfloat16.
    by_columns: whether codes lie so.
  """

  name: str
  spec: arg_specs.ArgSpec
  dtype: str = 'bfloat16'
  by_columns: bool = False

  @property
  def is_rounded(self) -> bool:
    return self.dtype == _ROUNDED

  def function(
    self, x: jax.Array, w: operand.Operand, scale: jax.Array | None = None
  ) -> jax.Array:
    spec = self.spec
    dtype = jnp.dtype('bfloat16' if self.is_rounded else self.dtype)
    return pallas_triton.quantized_matmul(
      x,
      w,
      spec.codes,
      spec.group,
      dtype,
      by_columns=self.by_columns,
      scale=scale,
    )

  @property
  def args(self) -> Any:
    spec = self.spec
    w = arg_specs.shapes(spec)
    if self.by_columns:
      values = jax.ShapeDtypeStruct(w.values.shape[::-1], w.values.dtype)
      w = w._replace(values=values)
    x = jax.ShapeDtypeStruct(
      (spec.num_tokens, spec.num_in), jnp.dtype(self.dtype)
    )
    scale = jax.ShapeDtypeStruct((spec.num_tokens, 1), jnp.float32)
    return (x, w, scale) if self.is_rounded else (x, w)


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


def rounded(model: str, matrix: str, num_tokens: int) -> Case:
  """Returns the case of rows that are rounded, too: fp8 by fp8."""
  few = num_tokens <= tuning.FEW_ROWS
  made = case(model, matrix, 'fp8', num_tokens, 'bfloat16' if few else _ROUNDED)
  return dataclasses.replace(
    made, name=f'{made.name} by columns', by_columns=True
  )


# Of these all ways are compiled: tiles of the one are narrow, of the other not.
_WHOLE = ('llama-3.1-8b', 'o'), ('llama-3.1-8b', 'gate_up')


def cases(device: str) -> Iterator[Case]:
  """Yields every default configuration, for `pallas_kernels.aot`.

  Iterate, and compile, while the default device is the one of this name.
  """
  if device == 'h100':  # Others have the rest.
    for model, matrix in (*_WHOLE, ('qwen2.5-72b-tp8', 'down')):
      for num_tokens in (16, 64, 65, 512, 2048):
        yield rounded(model, matrix, num_tokens)
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
