# SPDX-License-Identifier: Apache-2.0
"""Pallas, lowered to Triton: NVIDIA GPUs from Ampere on. One launch.

A block of the GPU takes a row, and holds it: adds, stores the sum, and
normalizes it. XLA writes one result from such a kernel, so it takes two
launches, or adds again wherever a sum is read.

On CPUs it runs in Pallas's interpreter, for tests.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
import jax.numpy as jnp

from pallas_kernels import devices
from pallas_kernels.add_and_norm import tuning
from pallas_kernels.ragged_paged_attention import tuning as attention_tuning


def add_and_norm(
  x: jax.Array, out: jax.Array, weight: jax.Array, eps: float, offset: int = 0
) -> tuple[jax.Array, jax.Array]:
  """Adds and normalizes; see `api.add_and_norm`.

  Raises:
    NotImplementedError: the kernel can't run on this device.
  """
  devices.check_triton(devices.default())
  if not x.size:
    return x, x  # No grid is empty.
  total, normed = devices.launch(
    functools.partial(_launch, eps=eps, offset=offset), x, out, weight
  )
  return total, normed


def _launch(
  x: jax.Array,
  out: jax.Array,
  weight: jax.Array,
  *,
  eps: float,
  offset: int,
  interpret: bool,
) -> Any:
  """Launches the kernel."""
  num_rows, width = x.shape
  return pl.pallas_call(
    functools.partial(_kernel, eps=eps, offset=offset),
    grid=(num_rows,),
    out_shape=(jax.ShapeDtypeStruct(x.shape, x.dtype),) * 2,
    compiler_params=plgpu.CompilerParams(
      num_warps=tuning.num_warps(width), num_stages=1
    ),
    interpret=interpret,
    name='add_and_norm',
  )(x, out, weight)


def _kernel(
  x_ref: Any,
  out_ref: Any,
  weight_ref: Any,
  total_ref: Any,
  normed_ref: Any,
  *,
  eps: float,
  offset: int,
) -> None:
  """Adds and normalizes a row: the kernel.

  Args:
    x_ref, out_ref: [T, D].
    weight_ref: [D].
    total_ref, normed_ref: [T, D], what is written.
    eps, offset: see `api.add_and_norm`.
  """
  row, width = pl.program_id(0), x_ref.shape[1]
  # A row in powers of two, which Triton needs.
  parts = [pl.ds(*piece) for piece in attention_tuning.pieces(width)]
  wide = []
  for part in parts:
    x, out = (
      plgpu.load(ref.at[row, part]).astype(jnp.float32)
      for ref in (x_ref, out_ref)
    )
    total = (x + out).astype(total_ref.dtype)
    plgpu.store(total_ref.at[row, part], total)
    wide.append(total.astype(jnp.float32))
  squares = [jnp.square(total).sum() for total in wide]
  factor = lax.rsqrt(functools.reduce(jnp.add, squares) / width + eps)
  for part, total in zip(parts, wide, strict=True):
    weight = offset + plgpu.load(weight_ref.at[part]).astype(jnp.float32)
    normed = (total * factor * weight).astype(normed_ref.dtype)
    plgpu.store(normed_ref.at[row, part], normed)
