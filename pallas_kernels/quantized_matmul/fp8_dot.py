# SPDX-License-Identifier: Apache-2.0
"""A product of numbers of fp8, for kernels of Pallas' Triton.

Hopper's instruction keeps fewer bits of a sum than float32 has. Pallas, which
has no argument for it, thus has Triton multiply in 16 bits instead. Here all
that one product sums is summed by the instruction, and products are added in
float32: with a depth of 128, as of DeepSeek-V3's kernels, which found that to
be enough.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax.extend import core
import jax.numpy as jnp

_fp8_dot = core.Primitive('fp8_dot')


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
  """Returns a @ b.

  Args:
    a: [rows, depth] float8_e4m3fn.
    b: [depth, columns] float8_e4m3fn, turned from what lies by columns.

  Returns:
    [rows, columns] float32.
  """
  _register()
  zeros = jnp.zeros((a.shape[0], b.shape[1]), jnp.float32)
  product: jax.Array = _fp8_dot.bind(a, b, zeros)
  return product


@_fp8_dot.def_abstract_eval
def _abstract(a: Any, b: Any, zeros: Any) -> Any:
  del a, b
  return zeros


@functools.cache
def _register() -> None:
  """Says how it is lowered, once: by a name of JAX's that is not public."""
  from jax._src.pallas.triton import lowering
  from jaxlib.triton import dialect

  @lowering.register_lowering(_fp8_dot)
  def lower(ctx: Any, a: Any, b: Any, zeros: Any) -> Any:
    del ctx
    depth = a.type.shape[1]
    return dialect.dot(a, b, zeros, max_num_imprecise_acc=depth)
