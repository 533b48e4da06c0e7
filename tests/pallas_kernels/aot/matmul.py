# SPDX-License-Identifier: Apache-2.0
"""A kernel with one tile, good and bad, and the mark of tests that compile."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
import jax.numpy as jnp
import pytest

from pallas_kernels.aot import toolkit

_MISSING = toolkit.missing()
_MISSING_DISASSEMBLY = toolkit.missing(disassembly=True)


def needs_wheels(test: Callable[..., None]) -> Any:
  """Marks a test of the lane that has the compiler."""
  skip = pytest.mark.skipif(_MISSING is not None, reason=str(_MISSING))
  return pytest.mark.aot(skip(test))


def needs_disassembler(test: Callable[..., None]) -> Any:
  """Marks a test of that lane that reads machine code."""
  reason = _MISSING_DISASSEMBLY
  return needs_wheels(
    pytest.mark.skipif(reason is not None, reason=str(reason))(test)
  )


@dataclasses.dataclass(frozen=True)
class Matmul:
  """A kernel with one tile, as large as it likes."""

  name: str
  rows: int
  columns: int
  num_stages: int
  inner: int = 1024
  block: int = 64

  def _kernel(self, x_ref: Any, y_ref: Any, out_ref: Any) -> None:
    def body(i: jax.Array, acc: jax.Array) -> jax.Array:
      at = pl.ds(i * self.block, self.block)
      return acc + plgpu.dot(
        plgpu.load(x_ref.at[:, at]), plgpu.load(y_ref.at[at, :])
      )

    acc = jax.lax.fori_loop(
      0,
      self.inner // self.block,
      body,
      jnp.zeros((self.rows, self.columns), jnp.float32),
    )
    plgpu.store(out_ref.at[:, :], acc.astype(out_ref.dtype))

  def function(self, x: jax.Array, y: jax.Array) -> Any:
    return pl.pallas_call(
      self._kernel,
      name=self.name,
      grid=(1,),
      out_shape=jax.ShapeDtypeStruct((self.rows, self.columns), x.dtype),
      compiler_params=plgpu.CompilerParams(
        num_warps=4, num_stages=self.num_stages
      ),
    )(x, y)

  @property
  def args(self) -> Any:
    return (
      jax.ShapeDtypeStruct((self.rows, self.inner), jnp.bfloat16),
      jax.ShapeDtypeStruct((self.inner, self.columns), jnp.bfloat16),
    )


GOOD = Matmul('good', 64, 64, 3)
SPILLS = Matmul('spills', 256, 256, 2)
TOO_MUCH_SHARED = Matmul('too_much_shared', 128, 128, 5)
