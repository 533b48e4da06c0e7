# SPDX-License-Identifier: Apache-2.0
"""Products with codes, by each implementation, against NumPy."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import gpu_targets
from pallas_kernels import quantized_matmul
from pallas_kernels.quantized_matmul import arg_specs
from pallas_kernels.quantized_matmul import nibbles
from pallas_kernels.quantized_matmul import operand
from pallas_kernels.quantized_matmul import pallas_triton
from pallas_kernels.quantized_matmul import plan as plan_lib
from pallas_kernels.quantized_matmul import rows
from pallas_kernels.quantized_matmul import tuning
from tests.pallas_kernels import unpacking_test

E2M1 = 0, 0.5, 1, 1.5, 2, 3, 4, 6
# Small enough for the matrices of `arg_specs` to take several turns, and the
# rest of one.
SIZES = tuning.Sizes(16, 64, 32, 4, 2)


def matrix_of(spec: arg_specs.ArgSpec, w: operand.Operand) -> np.ndarray:
  """The matrix, number by number, in float64."""
  found = np.empty((spec.num_in, spec.num_out))
  for row in range(spec.num_in):
    if spec.codes in ('int8', 'fp8'):
      codes = w.values[row].astype(np.float64)
    else:
      block, place = divmod(row, 32)
      packed = w.values[16 * block + place % 16]
      codes = packed >> 4 if place >= 16 else packed & 15
    group = row // (spec.group or spec.num_in)
    scale = w.scale[group].astype(np.float64)
    if spec.codes == 'int4':
      zero = 8.0 if w.zero is None else w.zero[group].astype(np.float64)
      codes = codes - zero
    if spec.codes == 'mxfp4':
      codes = np.take(E2M1, codes & 7) * np.where(codes & 8, -1, 1)
      scale = 2.0 ** (scale - 127)
    found[row] = codes * scale
  return found


def run(
  name: str, spec: arg_specs.ArgSpec, x: Any, w: operand.Operand
) -> jax.Array:
  def call(x: jax.Array, w: operand.Operand) -> jax.Array:
    if name == 'small tiles':
      return pallas_triton.quantized_matmul(
        x, w, spec.codes, spec.group, x.dtype, sizes=SIZES
      )
    return quantized_matmul.quantized_matmul(
      x,
      w.values,
      w.scale,
      codes=spec.codes,
      group=spec.group,
      zero=w.zero,
      implementation=name,
    )

  return jax.jit(call)(x, w)


@pytest.mark.parametrize(
  'name',
  ['reference', 'xla', pytest.param('small tiles', marks=pytest.mark.gpu)],
)
@pytest.mark.parametrize('spec', arg_specs.TESTS, ids=str)
def test_a_product_is_that_with_what_codes_stand_for(
  spec: arg_specs.ArgSpec, name: str
) -> None:
  x, w = arg_specs.make(spec)
  expected = x.astype(np.float64) @ matrix_of(spec, w)
  got = run(name, spec, x, w)
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, expected, atol=2e-6 * abs(expected).max())


@pytest.mark.gpu
def test_the_matrix_may_be_the_first_operand() -> None:
  spec = arg_specs.ArgSpec(20, 176, 72, 'int4', 64, True)
  x, w = arg_specs.make(spec)
  sizes = dataclasses.replace(SIZES, columns_first=True)
  got = pallas_triton.quantized_matmul(
    x, w, spec.codes, spec.group, x.dtype, sizes=sizes
  )
  expected = x.astype(np.float64) @ matrix_of(spec, w)
  np.testing.assert_allclose(got, expected, atol=2e-6 * abs(expected).max())


@pytest.mark.gpu
@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
@pytest.mark.parametrize('codes', ['fp8', 'int4'])
def test_a_product_of_halves_is_rounded_once(codes: str, dtype: str) -> None:
  spec = arg_specs.ArgSpec(3, 128, 64, codes, 64)
  x, w = arg_specs.make(spec)
  # Without scales, of which products are not exact in float32.
  w = w._replace(scale=np.ones_like(w.scale))
  x = np.round(4 * x).astype(dtype) / 4
  exact = x.astype(np.float64) @ matrix_of(spec, w)
  got = run('small tiles', spec, x, w)
  np.testing.assert_array_equal(got, exact.astype(np.float32).astype(dtype))


def rounded(x: np.ndarray) -> np.ndarray:
  """Number by number, what rows of fp8 stand for, in float64.

  XLA divides by 448 as it likes, and halves of steps are frequent: so scales
  are its own.
  """
  scales = np.asarray(jax.jit(rows.rounded)(x)[1])
  most = np.abs(x).max(axis=1, keepdims=True)
  np.testing.assert_allclose(
    scales, np.maximum(most / 448, 2.0**-126), rtol=1e-6
  )
  kinds = np.arange(256, dtype=np.uint8).view(jnp.float8_e4m3fn)
  known = np.unique(kinds.astype(np.float64)[np.isfinite(kinds)])
  found = np.empty(x.shape)
  for row, (numbers, scale) in enumerate(zip(x, scales, strict=True)):
    # Exactly between two is the even one: e4m3's codes are in order.
    places = np.float64(numbers / scale)
    above = np.clip(np.searchsorted(known, places), 1, len(known) - 1)
    low, high = known[above - 1], known[above]
    middle = (low + high) / 2
    is_even = low.astype(jnp.float8_e4m3fn).view(np.uint8) % 2 == 0
    takes_low = (places < middle) | ((places == middle) & is_even)
    found[row] = np.where(takes_low, low, high) * np.float64(scale)
  return found


# Rows that are few and many, and of a size that no tile divides.
ROUNDED = (
  arg_specs.ArgSpec(3, 80, 40, 'fp8'),
  arg_specs.ArgSpec(70, 272, 48, 'fp8'),
  arg_specs.ArgSpec(130, 64, 16, 'fp8'),
)


@pytest.mark.parametrize('spec', ROUNDED, ids=str)
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('by_columns', [False, True])
@pytest.mark.parametrize(
  'name',
  ['reference', 'xla', pytest.param('pallas_triton', marks=pytest.mark.gpu)],
)
def test_rows_are_rounded_by_scales_of_their_own(
  spec: arg_specs.ArgSpec, name: str, by_columns: bool, dtype: str
) -> None:
  x, w = arg_specs.make(spec)
  x *= np.logspace(-20, 20, len(x), dtype=np.float32)[:, None]
  x[1] = 0
  x = np.asarray(x, dtype)
  expected = rounded(x.astype(np.float32)) @ matrix_of(spec, w)
  got = jax.jit(
    lambda x, w: quantized_matmul.quantized_matmul(
      x,
      w.values.T if by_columns else w.values,
      w.scale,
      codes='fp8',
      activations='fp8',
      by_columns=by_columns,
      dtype=jnp.float32,
      implementation=name,
    )
  )(x, w)
  most = np.abs(expected).max(axis=1, keepdims=True)
  assert (np.abs(got - expected) <= 3e-6 * most).all()


def test_a_row_that_is_rounded_has_the_same_bits_whatever_others_are() -> None:
  x = np.random.default_rng(0).normal(size=(5, 32)).astype(np.float32)
  changed = x.copy()  # What was handed to JAX it may yet read.
  changed[0], changed[3] = np.inf, np.nan
  before, after = (jax.jit(rows.rounded)(given) for given in (x, changed))
  others = np.array([1, 2, 4])
  for was, now in zip(before, after, strict=True):
    np.testing.assert_array_equal(was[others], now[others])
    assert jnp.isfinite(was).all()
  assert np.isnan(np.asarray(after[0], np.float32)[[0, 3]]).all()


def test_gradients_are_those_of_rows_that_were_not_rounded() -> None:
  spec = arg_specs.ArgSpec(2, 32, 16, 'fp8')
  x, w = arg_specs.make(spec)

  def total(x: jax.Array, activations: str | None) -> jax.Array:
    out = quantized_matmul.quantized_matmul(
      x, w.values, w.scale, codes='fp8', activations=activations
    )
    return jnp.sum(out * np.arange(16, dtype=np.float32)[None])

  got, expected = (jax.grad(total)(x, kind) for kind in ('fp8', None))
  np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.gpu
def test_scales_of_mxfp4_are_exact_in_bfloat16() -> None:
  """All that codes may have, to the least and the largest."""
  spec = arg_specs.ArgSpec(3, 160, 64, 'mxfp4', 32)
  x, w = arg_specs.make(spec)
  w.scale[:] = np.arange(5 * 64).reshape(5, 64) % 253
  x = np.eye(3, 160, 40, dtype=jnp.bfloat16)  # So one number is each sum.
  many = dataclasses.replace(SIZES, rows=tuning.FEW_ROWS)
  got = pallas_triton.quantized_matmul(x, w, 'mxfp4', 32, x.dtype, sizes=many)
  np.testing.assert_array_equal(
    np.asarray(got, np.float64), matrix_of(spec, w)[40:43]
  )


@pytest.mark.gpu
def test_a_row_has_the_same_bits_whatever_others_are() -> None:
  spec = arg_specs.ArgSpec(20, 96, 40, 'int4', 32)
  x, w = arg_specs.make(spec)
  before = run('small tiles', spec, x, w)
  changed = x.copy()
  changed[[3, 17, 19]] = np.nan
  after = run('small tiles', spec, changed, w)
  for row in set(range(20)) - {3, 17, 19}:
    np.testing.assert_array_equal(after[row], before[row])


@pytest.mark.gpu
@pytest.mark.parametrize('codes', ['int8', 'fp8'])
def test_gradients_are_those_of_the_definition(codes: str) -> None:
  """By rows and scales: adapters are trained on what is quantized."""
  spec = arg_specs.ArgSpec(2, 32, 16, codes, 16)
  x, w = arg_specs.make(spec)
  mixing = np.random.default_rng(1).normal(size=(2, 16)).astype(np.float32)

  def total(name: str, x: jax.Array, scale: jax.Array) -> jax.Array:
    return jnp.sum(run(name, spec, x, w._replace(scale=scale)) * mixing)

  got, expected = (
    jax.grad(total, argnums=(1, 2))(name, x, w.scale)
    for name in ('pallas_triton', 'reference')
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3),
    got,
    expected,
  )


@pytest.mark.parametrize('high', [False, True])
@pytest.mark.parametrize(
  'codes,dtype',
  [
    *itertools.product(
      ('int4', 'zero', 'as_codes', 'mxfp4'), ('bfloat16', 'float16')
    ),
    ('scaled', 'bfloat16'),
  ],
)
def test_instructions_convert_every_code(
  codes: str, high: bool, dtype: str
) -> None:
  bits = np.random.default_rng(0).integers(0, 256, (4096, 4), np.uint8)
  zero = np.random.default_rng(1).integers(0, 16, (4096, 4), np.uint8)
  given = [bits.view(np.uint32)[:, 0]]
  found = bits >> 4 if high else bits & 15
  if codes == 'as_codes':
    expected = found.astype(np.int32) - zero
    given.append(zero.view(np.uint32)[:, 0])
  elif codes == 'zero':
    expected = found.astype(np.int32) - zero
    above = (zero + np.float32(1 << jnp.finfo(dtype).nmant)).astype(dtype)
    given += list(np.ascontiguousarray(above.view(np.uint32).T))
  elif codes == 'int4':
    expected = found.astype(np.int32) - 8
  else:
    expected = np.take(E2M1, found & 7) * np.where(found & 8, -1, 1)
  if codes == 'scaled':
    scale = np.random.default_rng(2).integers(0, 253, (4096, 4), np.uint8)
    expected = np.ldexp(expected, scale.astype(np.int32) - 127)
    given.append(scale.view(np.uint32)[:, 0])
  of, more = {
    'zero': ('int4', 2),
    'as_codes': ('int4', 1),
    'scaled': ('mxfp4', 1),
  }.get(codes, (codes, None))
  ptx = nibbles.assembly(of, dtype, high, more)
  halves = np.stack(unpacking_test.run(ptx, *given), 1).view(dtype)
  np.testing.assert_array_equal(halves, expected.astype(dtype))


@pytest.mark.parametrize('target', gpu_targets.TARGETS)
@pytest.mark.parametrize('kind', ['int8', 'int4-128'])
def test_multiprocessors_are_filled_with_few_sums(
  target: str, kind: str
) -> None:
  count = gpu_targets.TARGETS[target].multiprocessors
  codes, group, _ = arg_specs.KINDS[kind]
  for matrices in arg_specs.MODELS.values():
    for num_in, num_out in matrices.values():
      for tokens, sizes in tuning._FEW[operand.CODES[codes].bits]:
        shape = tuning.Shape(
          'bfloat16', codes, tokens, num_in, num_out, group or num_in
        )
        plan = plan_lib.of(shape, sizes, count)
        assert plan.splits * sizes.depth <= num_in
        assert plan.sums_bytes <= plan.values_bytes / 2
        if tokens == 16:
          assert count / 2 <= plan.num_items


@pytest.mark.parametrize(
  'change,message',
  [
    (dict(implementation='none'), "implementation='none': must be"),
    (dict(codes='int3'), "codes='int3': must be one of int8, fp8"),
    (dict(x=jnp.ones((4, 4, 4))), 'x=float32.*2 axes'),
    (dict(x=jnp.ones((4, 4), jnp.int32)), 'x=int32'),
    (dict(values=jnp.ones((4, 3))), r'values=float32.*must be int8\(4, 3\)'),
    (dict(group=2), r'scale=float32\(1, 3\): must be float32\(2, 3\)'),
    (dict(zero=jnp.ones((1, 3), jnp.uint8)), 'zero=.*None with int8'),
    (
      dict(activations='int8'),
      "activations='int8': must be None or one of fp8",
    ),
    (dict(activations='fp8'), "activations='fp8': needs the same codes"),
    (dict(by_columns=True), r'values=int8\(4, 3\): must be int8\(4, 4\)'),
    (dict(codes='int4', by_columns=True), 'by_columns=True: .*False with int4'),
    (dict(codes='int4'), r'values=int8\(4, 3\): must be uint8\(16, 3\)'),
  ],
)
def test_what_does_not_fit_is_refused_by_name(
  change: dict[str, Any], message: str
) -> None:
  args: dict[str, Any] = dict(
    x=jnp.ones((4, 4)),
    values=jnp.ones((4, 3), jnp.int8),
    scale=jnp.ones((1, 3)),
    codes='int8',
  )
  with pytest.raises(ValueError, match=message):
    quantized_matmul.quantized_matmul(**args | change)


def test_what_the_kernel_can_not_do_is_told() -> None:
  for spec, name in (
    (arg_specs.ArgSpec(1, 32, 12, 'int8'), 'num_out=12: must be a multiple of'),
    (arg_specs.ArgSpec(1, 40, 16, 'int8', 20), 'group=20: must be a multiple'),
  ):
    x, w = arg_specs.make(spec)
    with pytest.raises(NotImplementedError, match=name):
      run('pallas_triton', spec, x, w)
