# SPDX-License-Identifier: Apache-2.0
"""XLA reads codes where it multiplies, on the GPUs on which it can."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.aot import compiler
from sarathi_jax.models import matrices
from sarathi_jax.models import quantization
from sarathi_jax.models import quantized
from tests.pallas_kernels.aot import matmul

ROWS, COLUMNS = 4096, 14336


@pytest.mark.parametrize('tokens', [16, 512])
@pytest.mark.parametrize(
  ('device', 'codes'),
  [('a100', 'int8'), ('h100', 'int8'), ('h100', 'fp8')],
)
@matmul.needs_wheels
def test_no_matrix_is_put_together(
  device: str, codes: str, tokens: int
) -> None:
  """Without the autotuner, which a GPU runs; see ARCHITECTURE.md."""
  shape = jax.ShapeDtypeStruct
  w = quantized.Quantized(
    shape((ROWS, COLUMNS), jnp.dtype(quantization.CODES[codes].dtype)),
    shape((1, COLUMNS), jnp.float32),
    codes,
  )
  x = shape((tokens, ROWS), jnp.bfloat16)
  compiled = (
    jax.jit(matrices.matmul).lower(*compiler.placed((x, w), device)).compile()
  )
  assert compiled.memory_analysis().temp_size_in_bytes < ROWS * COLUMNS
