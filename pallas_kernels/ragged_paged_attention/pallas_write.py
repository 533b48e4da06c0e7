# SPDX-License-Identifier: Apache-2.0
"""Writes new keys and values to their pages, by Pallas, lowered to Triton.

XLA rounds keys and values together, and one launch stores them, with their
scales: a block of the GPU takes a token, and its keys or values of every head.
In a layer's step for A100 this takes as many launches as XLA's scatter does
(see `layout.write`), and two fewer where pages are quantized. (Keys and values
apart would take one more: XLA rounds each by a kernel of its own.)

On CPUs it runs in Pallas's interpreter, for tests.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
import jax.numpy as jnp

from pallas_kernels import devices
from pallas_kernels.ragged_paged_attention import layout
from pallas_kernels.ragged_paged_attention import quantization
from pallas_kernels.ragged_paged_attention import tuning

_NUM_WARPS = 4  # 8 heads of 128 channels: 16 bytes a thread, in 16 bits


def write(
  k_pages: quantization.Pages,
  v_pages: quantization.Pages,
  k: jax.Array,  # [T, K, h]
  v: jax.Array,  # [T, K, h]
  slot_mapping: jax.Array,  # [T]
) -> tuple[quantization.Pages, quantization.Pages]:
  """Writes as `api.write_kv`; the pages are rows (see `layout`).

  Raises:
    NotImplementedError: the kernel doesn't support such pages, or the device.
  """
  devices.check_triton(devices.default())
  tuning.check_indices(k_pages)
  if not layout.is_rows(k_pages):
    raise NotImplementedError(
      f'pallas_triton: k_pages={quantization.values_of(k_pages).shape}: must '
      'be rows, [N, K, page_size, h].'
    )
  if not slot_mapping.size:
    return k_pages, v_pages  # No grid is empty.
  return devices.launch(
    _launch, slot_mapping, _as_kept(k, v, k_pages), (k_pages, v_pages)
  )


def _as_kept(
  k: jax.Array, v: jax.Array, pages: quantization.Pages
) -> quantization.Pages:
  """Returns keys and values as they are kept, [2, T, K, h].

  Together, XLA rounds them by as many kernels as one of them.
  """
  if isinstance(pages, quantization.Quantized):
    both = jnp.stack([k.astype(jnp.float32), v.astype(jnp.float32)])
    return quantization.quantize_like(both, pages)
  return jnp.stack([k.astype(pages.dtype), v.astype(pages.dtype)])


def _launch(slots: jax.Array, new: Any, pages: Any, *, interpret: bool) -> Any:
  # slots: [T] int32; new: of `_as_kept`; pages: (k_pages, v_pages), which are
  # returned, updated in place.
  first = 1 + len(jax.tree.leaves(new))
  return pl.pallas_call(
    _store,
    grid=(*slots.shape, 2),
    out_shape=jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), pages
    ),
    input_output_aliases={
      first + i: i for i in range(len(jax.tree.leaves(pages)))
    },
    compiler_params=plgpu.CompilerParams(num_warps=_NUM_WARPS, num_stages=1),
    interpret=interpret,
    name='write_kv',
  )(slots, new, pages)


def _store(slots_ref: Any, new: Any, old_pages: Any, *pages: Any) -> None:
  """Stores the keys of one token, or its values: the kernel.

  Args:
    slots_ref: [T] int32.
    new: ref of [2, T, K, h]; or a `Quantized` of such refs, with scales
      [2, T, K].
    old_pages: the same memory as `pages`.
    *pages: refs of keys and of values, [N, K, page_size, h] each; or
      `Quantized` of such refs, with scales [N, K, page_size].
  """
  del old_pages  # They are `pages`.
  token, which = pl.program_id(0), pl.program_id(1)
  num_pages, _, page_size, _ = layout.sizes(pages[0])
  slot = slots_ref[token]
  is_real = (slot >= 0) & (slot < num_pages * page_size)
  page, offset = slot // page_size, slot % page_size

  def store(its_pages: Any) -> None:
    for new_ref, ref in zip(
      jax.tree.leaves(new), jax.tree.leaves(its_pages), strict=True
    ):
      # [2, T, K, h] into [N, K, page_size, h]; of scales, all but h.
      pieces = (
        [pl.ds(*piece) for piece in tuning.pieces(size)]
        for size in new_ref.shape[2:]
      )
      for heads, *channels in itertools.product(*pieces):
        plgpu.store(
          ref.at[page, heads, offset, *channels],
          plgpu.load(new_ref.at[which, token, heads, *channels]),
        )

  for i, its_pages in enumerate(pages):
    pl.when(is_real & (which == i))(functools.partial(store, its_pages))
