# SPDX-License-Identifier: Apache-2.0
"""The default configurations, to compile for GPUs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import mosaic_devices
from pallas_kernels.grouped_matmul import arg_specs
from pallas_kernels.grouped_matmul import coded
from pallas_kernels.grouped_matmul import grouping_triton
from pallas_kernels.grouped_matmul import pallas_mosaic
from pallas_kernels.grouped_matmul import pallas_triton
from pallas_kernels.quantized_matmul import arg_specs as quantized_specs


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
  """Something to compile for a GPU; a `pallas_kernels.aot.cases.Case`.

  Attributes:
    name: for people.
    spec: of the tokens, and of the matrices.
    kinds: of matrices; two are a gate and what it gates.
    dtype: of all that is in no codes.
    biases: whether there is one of each kind.
    codes: the key of `quantized_specs.KINDS` of how matrices are kept; None:
      they are arrays.
    rounded: whether rows are rounded to these codes, too, and codes lie by
      columns.
    multiply: the kernel's function.
  """

  name: str
  spec: arg_specs.ArgSpec
  kinds: int
  dtype: str = 'bfloat16'
  biases: bool = False
  codes: str | None = None
  rounded: bool = False
  multiply: Callable[..., jax.Array] = pallas_triton.grouped_matmul

  @property
  def matmul(self) -> coded.Coded | None:
    """How the codes are multiplied, if matrices are."""
    if self.codes is None:
      return None
    codes, group, _ = quantized_specs.KINDS[self.codes]
    if not self.rounded:
      return coded.Coded(codes, group)
    return coded.Coded(codes, group, activations=codes, by_columns=True)

  def function(
    self, x: jax.Array, sizes: jax.Array, rows: jax.Array, *more: Any
  ) -> jax.Array:
    return self.multiply(
      x,
      more[: self.kinds],
      sizes,
      rows,
      _gated if self.kinds == 2 else _only,
      self.matmul,
      biases=more[self.kinds :],
    )

  @property
  def args(self) -> Any:
    spec = self.spec
    rows = spec.num_tokens * spec.chosen
    return (
      jax.ShapeDtypeStruct(
        # What is computed of a token in one launch is a row in the next.
        (spec.num_tokens if self.kinds == 2 else rows, spec.num_in),
        jnp.dtype(self.dtype),
      ),
      jax.ShapeDtypeStruct((spec.num_groups,), jnp.int32),
      jax.ShapeDtypeStruct((rows,), jnp.int32),
      *[self._matrix()] * self.kinds,
      *[
        jax.ShapeDtypeStruct(
          (spec.num_groups, spec.num_out), jnp.dtype(self.dtype)
        )
        for _ in range(self.kinds if self.biases else 0)
      ],
    )

  def _matrix(self) -> Any:
    spec = self.spec
    if self.codes is None:
      return jax.ShapeDtypeStruct(
        (spec.num_groups, spec.num_in, spec.num_out), jnp.dtype(self.dtype)
      )
    one = quantized_specs.ArgSpec(
      1, spec.num_in, spec.num_out, *quantized_specs.KINDS[self.codes]
    )
    w = quantized_specs.shapes(one)
    if self.rounded:
      values = jax.ShapeDtypeStruct(w.values.shape[::-1], w.values.dtype)
      w = w._replace(values=values)
    return jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(
        (spec.num_groups, *leaf.shape), leaf.dtype
      ),
      w,
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


CODED_TOKENS = 16, 32, 512, 8192  # of steps: one for each tile at least


def _only(product: jax.Array) -> jax.Array:
  return product


def _gated(gate: jax.Array, up: jax.Array) -> jax.Array:
  return jax.nn.silu(gate) * up


def case(
  model: str,
  num_tokens: int,
  kinds: int,
  dtype: str = 'bfloat16',
  codes: str | None = None,
) -> Case:
  """Returns the case of a model's experts; see `arg_specs`.

  Args:
    model: of `arg_specs.MODELS`.
    num_tokens: T.
    kinds: 2: gate and up; 1: down.
    dtype, codes: see `Case`.
  """
  num_groups, chosen, width, inner = arg_specs.MODELS[model]
  sizes = (width, inner) if kinds == 2 else (inner, width)
  spec = arg_specs.ArgSpec(num_tokens, num_groups, chosen, *sizes)
  name = f'experts {model} {num_tokens} {"gated" if kinds == 2 else "out"}'
  if codes is not None:
    name = f'experts {codes} {name.removeprefix("experts ")}'
  if dtype != 'bfloat16':
    name += f' {dtype}'
  return Case(name, spec, kinds, dtype, model == 'gpt-oss-20b', codes)


def rounded(model: str, num_tokens: int, kinds: int) -> Case:
  """Returns the case of rows that are rounded, too: fp8 by fp8."""
  made = case(model, num_tokens, kinds, codes='fp8')
  return dataclasses.replace(made, name=f'{made.name} rounded', rounded=True)


def cases(device: str) -> Iterator[Case | GroupingCase]:
  """Yields every default configuration, for `pallas_kernels.aot`.

  Iterate, and compile, while the default device is the one of this name.
  """
  if device == 'h100':  # Others have the rest.
    for num_tokens in CODED_TOKENS:
      for kinds in (2, 1):
        yield rounded('qwen3-30b-a3b', num_tokens, kinds)
  for num_groups, chosen in sorted({m[:2] for m in arg_specs.MODELS.values()}):
    for num_tokens in arg_specs.TOKENS:
      yield GroupingCase(num_tokens * chosen, num_groups)
  for model in arg_specs.MODELS:
    for num_tokens in arg_specs.TOKENS:
      for kinds in (2, 1):
        yield case(model, num_tokens, kinds)
  for dtype in ('float16', 'float32'):
    for kinds in (2, 1):
      yield case('mixtral-8x7b', 64, kinds, dtype)
  for model, codes in arg_specs.CODED:
    for num_tokens in CODED_TOKENS:
      for kinds in (2, 1):
        yield case(model, num_tokens, kinds, codes=codes)
  if mosaic_devices.has_kernels():
    yield from mosaic_cases()


def mosaic_cases() -> Iterator[Case]:
  """Yields the cases of pallas_mosaic, which need a recent enough JAX.

  Of tiles of one warpgroup, and of two.
  """
  for model, (num_groups, chosen, width, inner) in arg_specs.MODELS.items():
    for num_tokens in (16, 4096):
      for kinds, sizes in ((2, (width, inner)), (1, (inner, width))):
        yield Case(
          f'experts {model} {num_tokens} '
          f'{"gated" if kinds == 2 else "out"} Mosaic',
          arg_specs.ArgSpec(num_tokens, num_groups, chosen, *sizes),
          kinds,
          'float16' if model == 'mixtral-8x7b' else 'bfloat16',
          biases=model == 'gpt-oss-20b',
          multiply=pallas_mosaic.grouped_matmul,
        )
