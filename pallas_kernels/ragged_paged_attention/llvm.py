# SPDX-License-Identifier: Apache-2.0
"""By a kernel for CPUs, of float32, whose pages are lines (see `layout`)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.llvm import COLUMNS
from pallas_kernels.ragged_paged_attention import batch as batch_lib
from pallas_kernels.ragged_paged_attention import layout
from pallas_kernels.ragged_paged_attention import quantization

_TARGET = 'pallas_kernels.ragged_paged_attention'
_NO_WINDOW = 2**30  # farther than any position


@functools.cache
def is_available() -> bool:
  """Says whether there is a kernel for this processor; compiles it."""
  from pallas_kernels.ragged_paged_attention import llvm_kernel

  return llvm_kernel.register(_TARGET, len(jax.local_devices(backend='cpu')))


def check(page_size: int, head_dim: int, dtype: jax.typing.DTypeLike) -> None:
  """Raises NotImplementedError if the kernel doesn't support such pages."""
  reason = ''
  if jnp.dtype(dtype) != jnp.float32:
    reason = f'dtype={jnp.dtype(dtype)}: must be float32'
  for name, size in (('page_size', page_size), ('head_dim', head_dim)):
    if size % COLUMNS:
      reason = f'{name}={size}: must be a multiple of {COLUMNS}'
  if not reason and not is_available():
    reason = 'not for this processor'
  if reason:
    raise NotImplementedError(f'llvm: {reason}.')


def ragged_paged_attention(
  q: jax.Array,
  k_pages: quantization.Pages,
  v_pages: quantization.Pages,
  batch: batch_lib.Batch,
  options: batch_lib.Options,
  sinks: jax.Array | None = None,
) -> jax.Array:
  """Attends as `api.ragged_paged_attention`.

  Every batch is computed alike, so that `batch_invariant` costs nothing.
  """
  _, _, page_size, head_dim = layout.sizes(k_pages)
  check(page_size, head_dim, quantization.values_of(k_pages).dtype)
  has_sinks = sinks is not None
  if sinks is None:
    sinks = jnp.zeros(q.shape[1])
  cap, window = options.soft_cap, options.sliding_window
  call = jax.ffi.ffi_call(_TARGET, jax.ShapeDtypeStruct(q.shape, jnp.float32))
  out: jax.Array = call(
    q.astype(jnp.float32),
    k_pages,
    v_pages,
    batch.kv_lens,
    batch.page_indices,
    batch.cu_q_lens,
    batch.distribution,
    sinks.astype(jnp.float32),
    jnp.array([options.scale, cap or 1], jnp.float32),
    jnp.array([window or _NO_WINDOW, has_sinks, cap is not None], jnp.int32),
  )
  return out.astype(q.dtype)
