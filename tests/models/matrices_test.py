# SPDX-License-Identifier: Apache-2.0
"""A product is the same, however the matrix lies in memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sarathi_jax.models import matrices


@pytest.mark.parametrize(
  'num_rows', [1, 2, 8, 32, matrices._FEW_ROWS, matrices._FEW_ROWS + 1]
)
@pytest.mark.parametrize(
  'dtype,out_dtype',
  [('float32', None), ('bfloat16', None), ('bfloat16', 'float32')],
)
def test_a_product_does_not_depend_on_how_a_matrix_lies(
  num_rows, dtype, out_dtype
):
  x, w = (
    jax.random.normal(jax.random.key(i), shape, jnp.dtype(dtype))
    for i, shape in enumerate(((num_rows, 48), (48, 20)))
  )
  got, expected = (
    jax.jit(lambda x, w: matrices.matmul(x, w, out_dtype))(x, lies)
    for lies in (matrices.Transposed(w.T), w)
  )
  assert got.dtype == expected.dtype == (out_dtype or dtype)
  assert got.shape == (num_rows, 20)
  exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
  rounding = 0.05 if expected.dtype == 'bfloat16' else 1e-4
  for result in (got, expected):
    np.testing.assert_allclose(result, exact, atol=rounding, rtol=0.01)


def test_few_rows_are_not_multiplied_by_a_copy_of_the_matrix():
  """On a CPU, where it is what transposing is for."""
  x, w = jnp.ones((8, 256)), jnp.ones((512, 256))
  compiled = jax.jit(matrices.matmul).lower(x, matrices.Transposed(w)).compile()
  (dot,) = (line for line in compiled.as_text().splitlines() if ' dot(' in line)
  assert 'f32[512,8]{1,0} dot(' in dot
  assert 'lhs_contracting_dims={1}, rhs_contracting_dims={0}' in dot
  assert compiled.memory_analysis().temp_size_in_bytes < w.nbytes / 4
