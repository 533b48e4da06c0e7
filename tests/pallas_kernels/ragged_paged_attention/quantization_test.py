# SPDX-License-Identifier: Apache-2.0
"""Numbers of one byte: what they stand for, and how far off they are."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import unpacking
from pallas_kernels.ragged_paged_attention import quantization

DTYPES = quantization.DTYPES


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_every_byte_is_decoded(dtype: str) -> None:
  codes = np.arange(256, dtype=np.uint8)
  want = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
  got = np.asarray(
    jax.jit(unpacking.decode, static_argnums=1)(jnp.asarray(codes), dtype),
    np.float32,
  )
  is_nan = np.isnan(want)
  assert is_nan.sum() == 2  # Nothing is ever rounded to these.
  np.testing.assert_array_equal(got[~is_nan], want[~is_nan])
  ints = np.arange(-128, 128).astype(np.int8)
  np.testing.assert_array_equal(
    np.asarray(unpacking.decode(jnp.asarray(ints), dtype), np.float32),
    ints.astype(np.float32),
  )


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_errors_are_small(dtype: jnp.dtype) -> None:
  x = np.random.default_rng(0).standard_normal((64, 4, 128)).astype(np.float32)
  x *= np.array([1e-6, 1e-3, 1, 1e4])[None, :, None]  # heads of any size
  q = jax.jit(quantization.quantize, static_argnums=1)(jnp.asarray(x), dtype)
  assert q.values.shape == x.shape
  assert q.scales.shape == x.shape[:-1]
  got = unpacking.decode(q.values, 'float32') * q.scales[..., None]
  error = np.abs(got - x)
  top = np.abs(x).max(-1, keepdims=True)
  if dtype == quantization.INT8:
    assert (error <= top / 127 * 0.5001).all()
  else:
    # Three bits of mantissa; below 2**-6, fixed steps of 2**-9.
    assert (
      error <= np.maximum(np.abs(x) / 16, top / 448 * 2**-10) * 1.0001
    ).all()
  relative = np.sqrt((error**2).mean() / (x**2).mean())
  low, high = (0.003, 0.01) if dtype == quantization.INT8 else (0.015, 0.035)
  assert low < relative < high


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('value', [0.0, 1e-38, 3.0, 65504.0, 1e38])
def test_extremes(dtype: jnp.dtype, value: float) -> None:
  x = jnp.array([[value, -value, 0.0, value / 2]], jnp.float32)
  q = quantization.quantize(x, dtype)
  got = unpacking.decode(q.values, 'float32') * q.scales[..., None]
  np.testing.assert_allclose(got, x, rtol=1 / 126, atol=1e-30)
