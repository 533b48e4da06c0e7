# SPDX-License-Identifier: Apache-2.0
"""Adding and normalizing, by each implementation, against a loop in NumPy."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import add_and_norm as raw
from pallas_kernels.add_and_norm import arg_specs
from pallas_kernels.add_and_norm import reference
from pallas_kernels.add_and_norm import tuning

BY_NAME = pytest.mark.parametrize(
  'name', ['xla', pytest.param('pallas_triton', marks=pytest.mark.gpu)]
)
BY_SPEC = pytest.mark.parametrize(
  'spec', arg_specs.TESTS.values(), ids=arg_specs.TESTS
)
_run = jax.jit(
  raw.add_and_norm, static_argnames=('eps', 'offset', 'implementation')
)


@BY_NAME
@BY_SPEC
def test_is_what_the_loop_does(spec: arg_specs.ArgSpec, name: str) -> None:
  """The sum has its bits; the norm is within a rounding or two."""
  args = arg_specs.make(spec)
  total, normed = _run(**args, implementation=name)
  want, want_normed = reference.add_and_norm(**args)
  assert (total.dtype, normed.dtype) == (want.dtype, want_normed.dtype)
  np.testing.assert_array_equal(total, want)
  eps = float(jnp.finfo(spec.dtype).eps)
  np.testing.assert_allclose(
    np.asarray(normed, np.float32),
    np.asarray(want_normed, np.float32),
    rtol=eps * (1 if eps > 1e-6 else 8),
  )
  assert not normed[1:][-1:].any()  # A row of zeros has a norm: zeros.


@pytest.mark.gpu
@BY_SPEC
def test_the_kernel_has_the_bits_of_xla(spec: arg_specs.ArgSpec) -> None:
  """But where it sums up in another order: then within a rounding."""
  args = arg_specs.make(spec, seed=1)
  got, want = (
    _run(**args, implementation=name) for name in ('pallas_triton', 'xla')
  )
  np.testing.assert_array_equal(got[0], want[0])
  wide = [np.asarray(normed, np.float32) for normed in (got[1], want[1])]
  np.testing.assert_allclose(*wide, rtol=4 * float(jnp.finfo(spec.dtype).eps))


@BY_NAME
def test_a_row_does_not_depend_on_others(name: str) -> None:
  args = arg_specs.make(arg_specs.TESTS['pieces'])
  whole = _run(**args, implementation=name)
  rest = {key: args[key] for key in ('weight', 'eps', 'offset')}
  poison = {
    key: jnp.full_like(args[key], jnp.nan).at[2].set(args[key][2])
    for key in ('x', 'out')
  }
  alone = _run(**poison, **rest, implementation=name)
  for x, y in zip(whole, alone, strict=True):
    np.testing.assert_array_equal(x[2], y[2])


@BY_NAME
def test_rows_may_be_none(name: str) -> None:
  args = arg_specs.make(arg_specs.ArgSpec(num_rows=0))
  total, normed = _run(**args, implementation=name)
  assert total.shape == normed.shape == (0, 64)


@pytest.mark.parametrize(
  ('name', 'value', 'match'),
  [
    ('x', jnp.zeros(64), r'x=\(64,\): must have 2 axes'),
    ('x', jnp.zeros((5, 64), jnp.int32), 'x=int32: must be a float'),
    ('out', jnp.zeros((5, 32)), r'out=float32\(5, 32\): must be as x, float32'),
    ('out', jnp.zeros((5, 64), jnp.bfloat16), 'out=bfloat16.*: must be as x'),
    ('weight', jnp.zeros(32), r'weight=\(32,\): must be \(64,\)'),
    ('weight', jnp.zeros(64, jnp.int32), 'weight=int32: must be a float'),
    ('implementation', 'cuda', 'implementation=cuda: must be None or one of'),
  ],
)
def test_what_does_not_fit_is_named(name: str, value: Any, match: str) -> None:
  args = arg_specs.make(arg_specs.TESTS['plain']) | {name: value}
  with pytest.raises(ValueError, match=match):
    raw.add_and_norm(**args)


def test_it_is_the_docstrings_example() -> None:
  total, normed = raw.add_and_norm(
    jnp.array([[1.0, 2.0]]),
    jnp.array([[2.0, 2.0]]),
    jnp.array([1.0, 2.0]),
    eps=0,
  )
  np.testing.assert_array_equal(total, [[3, 4]])
  np.testing.assert_allclose(normed, [[0.849, 2.263]], atol=1e-3)


def test_a_cpu_takes_plain_arithmetic() -> None:
  args = arg_specs.make(arg_specs.TESTS['plain'])
  options = {key: args.pop(key) for key in ('eps', 'offset')}
  run = functools.partial(raw.add_and_norm, **options)
  assert 'pallas_call' not in str(jax.make_jaxpr(run)(**args))


@pytest.mark.parametrize(
  ('width', 'warps'), [(64, 1), (2880, 4), (4096, 8), (8192, 16), (16384, 16)]
)
def test_a_thread_has_sixteen_numbers(width: int, warps: int) -> None:
  assert tuning.num_warps(width) == warps
