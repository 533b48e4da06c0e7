# SPDX-License-Identifier: Apache-2.0
"""Grouped products with matrices in codes, against NumPy."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import grouped_matmul
from pallas_kernels.grouped_matmul import arg_specs
from pallas_kernels.grouped_matmul import pallas_triton
from pallas_kernels.grouped_matmul import tuning
from pallas_kernels.quantized_matmul import arg_specs as quantized_specs
from pallas_kernels.quantized_matmul import operand
from pallas_kernels.quantized_matmul import tuning as quantized_tuning
from tests.pallas_kernels.quantized_matmul import quantized_matmul_test

# Small enough for several turns, and the rest of one.
SIZES = quantized_tuning.Sizes(16, 64, 32, 4, 2)
# All codes, and groups; columns that tiles do not divide; rows of groups that
# are several tiles, and padding.
CASES = (
  (arg_specs.ArgSpec(6, 8, 2, 80, 48), 'int8', None, False),
  (arg_specs.ArgSpec(9, 4, 2, 80, 40, 'skewed', 2), 'fp8', 32, False),
  (arg_specs.ArgSpec(40, 3, 2, 160, 96), 'int4', 64, True),
  (arg_specs.ArgSpec(3, 5, 2, 40, 32), 'int4', None, False),
  (arg_specs.ArgSpec(6, 8, 4, 96, 48), 'mxfp4', 32, False),
)


def combined(gate: jax.Array, up: jax.Array) -> jax.Array:
  return gate - 3 * up


def call(
  name: str,
  how: grouped_matmul.Coded,
  args: tuple[Any, ...],
  biases: tuple[np.ndarray, ...] = (),
) -> jax.Array:
  """Returns what each token gets of each group it chose, [T, k, out]."""
  x, matrices, keys = args
  combine = combined if len(matrices) == 2 else grouped_matmul.first
  groups = grouped_matmul.group(
    jnp.asarray(keys).reshape(-1), matrices[0].values.shape[0]
  )
  rows = groups.order // keys.shape[1]
  if name == 'small tiles':
    of_tile = quantized_tuning.Shape(
      'float32',
      how.codes,
      SIZES.rows,
      x.shape[1],
      matrices[0].values.shape[-1],
      how.group or x.shape[1],
    )
    plan = tuning.plan_coded(of_tile, SIZES, len(matrices))
    out = pallas_triton.grouped_matmul(
      x,
      tuple(matrices),
      groups.sizes,
      rows,
      combine,
      how,
      biases,
      multiplier=pallas_triton.Codes(plan),
    )
  else:
    out = grouped_matmul.grouped_matmul(
      x,
      matrices,
      groups.sizes,
      rows=rows,
      biases=biases,
      combine=combine,
      matmul=how,
      implementation=name,
    )
  return out[groups.places].reshape(*keys.shape, -1)


def numbers_of(
  spec: arg_specs.ArgSpec,
  how: grouped_matmul.Coded,
  w: operand.Operand,
  group: int,
) -> np.ndarray:
  """The matrix of a group, in float64."""
  of_one = quantized_specs.ArgSpec(
    1, spec.num_in, spec.num_out, how.codes, how.group, w.zero is not None
  )
  mine = operand.Operand(*(None if a is None else a[group] for a in w))
  return quantized_matmul_test.matrix_of(of_one, mine)


@pytest.mark.parametrize(
  'name',
  [
    'reference',
    'xla',
    pytest.param('small tiles', marks=pytest.mark.gpu),
  ],
)
@pytest.mark.parametrize('kinds', [1, 2])
@pytest.mark.parametrize('case', CASES, ids=str)
def test_rows_are_multiplied_by_what_their_groups_codes_stand_for(
  case: Any, kinds: int, name: str
) -> None:
  spec, codes, group, has_zero = case
  how = grouped_matmul.Coded(codes, group)
  x, matrices, keys = arg_specs.make_coded(spec, codes, group, has_zero, kinds)
  biases = np.random.default_rng(3).normal(
    size=(kinds, spec.num_groups, spec.num_out)
  )
  biases = tuple(biases.astype(np.float32)) if kinds == 2 else ()
  got = jax.jit(lambda args, biases: call(name, how, args, biases))(
    (x, matrices, keys), biases
  )
  found = {
    (kind, g): numbers_of(spec, how, w, g)
    for kind, w in enumerate(matrices)
    for g in np.unique(keys)
    if g < spec.num_groups
  }
  for token in range(spec.num_tokens - spec.num_padding):
    for place, g in enumerate(keys[token]):
      products = [
        x[token].astype(np.float64) @ found[kind, g] for kind in range(kinds)
      ]
      if biases:
        products = [
          p + bias[g] for p, bias in zip(products, biases, strict=True)
        ]
      expected = np.asarray(
        products[0] - 3 * products[1] if kinds == 2 else products[0]
      )
      np.testing.assert_allclose(
        got[token, place], expected, atol=2e-6 * (1 + abs(expected).max())
      )


# Tiles of few rows, of 16 bits, and of many, which multiply 8 bits by 8.
ROUNDED = (
  arg_specs.ArgSpec(9, 4, 2, 80, 40, 'skewed', 2),
  arg_specs.ArgSpec(70, 2, 2, 144, 48),
)


@pytest.mark.parametrize(
  'name',
  ['reference', 'xla', pytest.param('pallas_triton', marks=pytest.mark.gpu)],
)
@pytest.mark.parametrize('by_columns', [False, True])
@pytest.mark.parametrize('spec', ROUNDED, ids=str)
def test_rows_are_rounded_by_scales_of_their_own(
  spec: arg_specs.ArgSpec, by_columns: bool, name: str
) -> None:
  how = grouped_matmul.Coded('fp8', None, 'fp8', by_columns)
  x, matrices, keys = arg_specs.make_coded(spec, 'fp8', kinds=2)
  num = spec.num_tokens - spec.num_padding
  x[:num] *= np.logspace(-20, 20, num, dtype=np.float32)[:, None]
  given = [
    w._replace(values=w.values.swapaxes(-1, -2)) if by_columns else w
    for w in matrices
  ]
  got = jax.jit(lambda args: call(name, how, args))((x, given, keys))
  rows = quantized_matmul_test.rounded(x[:num])
  found = [
    {g: numbers_of(spec, how, w, g) for g in np.unique(keys[:num])}
    for w in matrices
  ]
  for token, row in enumerate(rows):
    for place, g in enumerate(keys[token]):
      gate, up = (row @ of[g] for of in found)
      most = max(abs(gate).max(), abs(up).max())
      np.testing.assert_allclose(
        got[token, place], gate - 3 * up, rtol=0, atol=1e-5 * most
      )


@pytest.mark.gpu
def test_a_row_has_the_same_bits_whatever_others_choose() -> None:
  spec = arg_specs.ArgSpec(24, 8, 2, 64, 32)
  how = grouped_matmul.Coded('int4', 32)
  x, matrices, keys = arg_specs.make_coded(spec, 'int4', 32)
  (w,) = matrices
  w = w._replace(scale=np.nan_to_num(w.scale, nan=1))
  run = jax.jit(lambda args: call('small tiles', how, args))
  before = run((x, [w], keys))
  others = arg_specs.choose(spec, seed=2)
  others[7], others[20:] = keys[7], 8
  after = run((x, [w], others))
  np.testing.assert_array_equal(after[7], before[7])


def test_gradients_are_those_of_the_definition() -> None:
  """By rows and scales: adapters are trained on what is quantized."""
  spec = arg_specs.ArgSpec(6, 3, 2, 32, 16, routing='uniform')
  how = grouped_matmul.Coded('int8', 16)
  x, (w,), keys = arg_specs.make_coded(spec, 'int8', 16)
  scale = np.nan_to_num(w.scale, nan=1)

  def total(name: str, x: jax.Array, scale: jax.Array) -> jax.Array:
    return jnp.sum(
      jnp.sin(call(name, how, (x, [w._replace(scale=scale)], keys)) / 100)
    )

  got, expected = (
    jax.grad(total, argnums=(1, 2))(name, x, scale)
    for name in ('xla', 'reference')
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3),
    got,
    expected,
  )


@pytest.mark.parametrize('num_rows', [4, 64])
@pytest.mark.parametrize('codes,group', [('int8', None), ('mxfp4', 32)])
def test_on_cpus_one_matrix_is_put_together_at_a_time(
  codes: str, group: int | None, num_rows: int
) -> None:
  """At most: never those of all groups."""
  spec = arg_specs.ArgSpec(num_rows, 16, 1, 256, 256)
  args = arg_specs.make_coded(spec, codes, group)
  how = grouped_matmul.Coded(codes, group)
  compiled = jax.jit(lambda args: call('xla', how, args)).lower(args).compile()
  one = 4 * spec.num_in * spec.num_out  # in float32
  temporary = compiled.memory_analysis().temp_size_in_bytes
  assert temporary < 4 * one < spec.num_groups * one / 2


@pytest.mark.parametrize(
  'change,message',
  [
    (dict(matrices=[jnp.ones((2, 4, 3))]), 'matrices=.*must be Operands'),
    (dict(matmul=grouped_matmul.Coded('int3')), "codes='int3': must be one of"),
    (
      dict(matmul=grouped_matmul.Coded('int8', 2)),
      r'scale=float32\(2, 1, 3\): must be float32\(2, 2, 3\)',
    ),
    (dict(x=jnp.ones((4, 5))), r'values=int8\(2, 4, 3\): must be'),
  ],
)
def test_what_does_not_fit_is_refused_by_name(
  change: dict[str, Any], message: str
) -> None:
  w = operand.Operand(jnp.ones((2, 4, 3), jnp.int8), jnp.ones((2, 1, 3)))
  args: dict[str, Any] = dict(
    x=jnp.ones((4, 4)),
    matrices=[w],
    group_sizes=jnp.ones(2, jnp.int32),
    matmul=grouped_matmul.Coded('int8'),
  )
  with pytest.raises(ValueError, match=message):
    grouped_matmul.grouped_matmul(**args | change)
