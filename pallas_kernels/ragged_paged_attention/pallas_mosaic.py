# SPDX-License-Identifier: Apache-2.0
"""Pallas, lowered to Mosaic: prefills on Hopper, all on Ampere.

On Hopper, chunks of prefills are cut into tiles (`plan.make_chunks`). As many
blocks (CTAs) as the GPU has multiprocessors take them in turn. A tile is of two
query heads of a group, or of one head and twice the queries where a group is
odd: so the two warpgroups that compute need the same keys, for 64 rows of
queries each. A third warpgroup fetches: it finds pages of keys and values in
the page table, and copies them by TMA into a ring of buffers in shared memory.
It goes on to the next tile while the last one is being finished. This is the
division of labour of FlashAttention-3 (arXiv 2407.08608, section 3.1), over
pages. Decodes, and sequences as small, wait for memory and not for matmuls.
`pallas_triton` does them, so a hybrid batch takes one more launch.

On Ampere the plan and the launches are those of `pallas_triton`: one for small
sequences, one that merges what of them was split, one for chunks.

On CPUs they run in Mosaic's interpreter, for tests.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
from typing import Any

import jax
from jax import lax
from jax.experimental.pallas import mosaic_gpu
import jax.numpy as jnp

from pallas_kernels import devices
from pallas_kernels.ragged_paged_attention import batch as batch_lib
from pallas_kernels.ragged_paged_attention import mosaic_ampere
from pallas_kernels.ragged_paged_attention import mosaic_fetch
from pallas_kernels.ragged_paged_attention import mosaic_hopper
from pallas_kernels.ragged_paged_attention import mosaic_merge
from pallas_kernels.ragged_paged_attention import pallas_triton
from pallas_kernels.ragged_paged_attention import plan as plan_lib
from pallas_kernels.ragged_paged_attention import tuning
from pallas_kernels.ragged_paged_attention import validate

plgpu: Any = mosaic_gpu  # JAX 0.10 lacks half of it.
# wgmma reads shared memory in tiles of 8 rows of 128 bytes, whose bytes are
# exchanged (swizzled) so that no two rows have a bank in common.
_TILED: Any = dict(
  transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
)


def make_plan(
  kv_lens: jax.Array,
  cu_q_lens: jax.Array,
  distribution: jax.Array,
  *,
  num_tokens: int,
  sliding_window: int | None,
  shape: tuning.Shape,
  decodes_only: bool = False,
) -> plan_lib.Plan:
  """Plans a traced batch, for all layers of one window.

  Raises:
    NotImplementedError: the kernel doesn't support the shapes, the device or
      this JAX.
  """
  batch: Any = dict(
    kv_lens=kv_lens,
    cu_q_lens=cu_q_lens,
    distribution=distribution,
    num_tokens=num_tokens,
    sliding_window=sliding_window,
  )
  sizes = tuning.choose_mosaic(shape)
  if isinstance(sizes, tuning.Sizes):
    return pallas_triton.make_plan(
      **batch, sizes=sizes, shape=shape, decodes_only=decodes_only
    )
  small = tuning.choose(shape)
  plan = pallas_triton.make_plan(
    **batch, sizes=small, shape=shape, decodes_only=True
  )
  if decodes_only:
    return plan
  return plan._replace(
    chunks=plan_lib.make_chunks(
      **batch,
      rows=sizes.queries,
      group=1,  # A tile has a query's heads apart, or side by side.
      block_n=sizes.block_n,
      small=small.tiling.most_queries(shape.group),
      xp=jnp,
    )
  )


def ragged_paged_attention(
  q: jax.Array,
  k_pages: jax.Array,
  v_pages: jax.Array,
  batch: batch_lib.Batch,
  options: batch_lib.Options,
  *,
  plan: plan_lib.Plan | None = None,
) -> jax.Array:
  """Attends as `api.ragged_paged_attention`; pages are rows (see `layout`).

  Args:
    q, k_pages, v_pages, batch, options: see there.
    plan: of `make_plan`; None makes it here.

  Raises:
    NotImplementedError: see `make_plan`.
  """
  shape = tuning.Shape.of(q, k_pages)
  sizes = tuning.choose_mosaic(shape)
  if plan is None:
    plan = make_plan(
      batch.kv_lens,
      batch.cu_q_lens,
      batch.distribution,
      num_tokens=q.shape[0],
      sliding_window=options.sliding_window,
      shape=shape,
    )
  validate.check(
    isinstance(plan, plan_lib.Plan),
    'plan',
    type(plan).__name__,
    'must be of make_plan for this implementation',
  )
  # Without it XLA fuses a slice of a larger array with the call, and leaves
  # both out of the CUDA graph.
  kv_lens, page_indices, cu_q_lens = lax.optimization_barrier(batch[:3])
  batch = batch_lib.Batch(kv_lens, page_indices, cu_q_lens, batch.distribution)
  if isinstance(sizes, tuning.Sizes):
    return _on_ampere(shape, sizes, q, k_pages, v_pages, batch, options, plan)
  return _on_hopper(shape, sizes, q, k_pages, v_pages, batch, options, plan)


def _on_ampere(
  shape: tuning.Shape,
  sizes: tuning.Sizes,
  q: jax.Array,
  k_pages: jax.Array,
  v_pages: jax.Array,
  batch: batch_lib.Batch,
  options: batch_lib.Options,
  plan: plan_lib.Plan,
) -> jax.Array:
  """Launches a kernel for small sequences, another for chunks."""
  interpret = devices.default().platform == 'cpu'
  # Each row of queries is read before its outputs take its place.
  rows_ref = jax.new_ref(q.reshape(-1, shape.head_dim))
  arguments = rows_ref, k_pages, v_pages, *batch[:3]
  if (small := plan.small) is not None:
    spec = mosaic_fetch.Spec(shape, sizes.small, options, interpret)
    partials = _ampere_kernel(spec, 'attend_small', len(small.seq))(
      *arguments, *small[:6]
    )
    _merge_kernel(spec)(rows_ref, *partials, batch.cu_q_lens, *small[6:])
  if (chunks := plan.chunks) is not None:
    spec = mosaic_fetch.Spec(shape, sizes.chunks, options, interpret)
    _ampere_kernel(spec, 'attend_chunks')(*arguments, *chunks)
  return jax.freeze(rows_ref).reshape(q.shape)


def _ampere_kernel(
  spec: mosaic_fetch.Spec, name: str, slots: int | None = None
) -> Callable[..., Any]:
  """Returns a kernel; its arguments are those of `mosaic_fetch.Inputs`.

  Args:
    spec: what it is compiled for.
    name: what profiles call it.
    slots: partial results that there may be, which the kernel returns; None:
      every result is whole, and there is no `Inputs.slot`.
  """
  tile, head_dim = spec.tile, spec.shape.head_dim
  ring = tile.num_stages, tile.block_n, head_dim
  out_type: Any = ()
  if slots is not None:
    rows = slots * spec.shape.num_kv_heads * tile.rows
    out_type = tuple(
      jax.ShapeDtypeStruct(shape, jnp.float32)
      for shape in ((rows, head_dim), (rows,), (rows,))
    )

  def attend(*refs: Any) -> None:
    fields = [
      field
      for field in mosaic_fetch.Inputs._fields
      if field != 'slot' or slots is not None
    ]
    inputs, rest = refs[: len(fields)], refs[len(fields) :]
    mosaic_ampere.attend(
      spec,
      mosaic_fetch.Inputs(
        **{'slot': None} | dict(zip(fields, inputs, strict=True))
      ),
      None if slots is None else mosaic_ampere.Partials(*rest[:3]),
      mosaic_fetch.Scratch(*rest[len(out_type) :]),
    )

  attend.__name__ = name
  kernel: Callable[..., Any] = plgpu.kernel(
    attend,
    out_type=out_type,
    grid=(tile.num_blocks,),
    grid_names=('block',),
    num_threads=spec.warpgroups,
    thread_name='warpgroup',
    scratch_types=[
      plgpu.SMEM(ring, spec.shape.dtype, **_TILED),
      plgpu.SMEM(ring, spec.shape.dtype, **_TILED),
      *([plgpu.Barrier(num_arrivals=spec.warpgroups)] * spec.interpret),
    ],
    compiler_params=plgpu.CompilerParams(
      approx_math=True,
      reduction_scratch_bytes=0,  # No sum crosses warps.
    ),
    interpret=plgpu.InterpretGPUParams() if spec.interpret else None,
  )
  return kernel


def _merge_kernel(spec: mosaic_fetch.Spec) -> Callable[..., Any]:
  """Returns a kernel; its arguments are those of `mosaic_merge.Inputs`."""

  def merge_splits(*refs: Any) -> None:
    mosaic_merge.merge(spec, mosaic_merge.Inputs(*refs))

  kernel: Callable[..., Any] = plgpu.kernel(
    merge_splits,
    out_type=(),
    grid=(spec.tile.num_blocks,),
    grid_names=('block',),
    num_threads=1,
    thread_name='warpgroup',
    compiler_params=plgpu.CompilerParams(approx_math=True),
    interpret=plgpu.InterpretGPUParams() if spec.interpret else None,
  )
  return kernel


def _on_hopper(
  shape: tuning.Shape,
  sizes: tuning.MosaicSizes,
  q: jax.Array,
  k_pages: jax.Array,
  v_pages: jax.Array,
  batch: batch_lib.Batch,
  options: batch_lib.Options,
  plan: plan_lib.Plan,
) -> jax.Array:
  """Launches Triton's kernels for small sequences, then one for chunks."""
  out = pallas_triton.ragged_paged_attention(
    q, k_pages, v_pages, batch, options, plan=plan._replace(chunks=None)
  )
  if plan.chunks is None:
    return out
  spec = mosaic_hopper.Spec(shape, sizes, options, q.shape[1])
  # Each row of queries is read before its outputs take its place.
  rows_ref = jax.new_ref(out)
  _hopper_kernel(spec)(rows_ref, k_pages, v_pages, *batch[:3], *plan.chunks)
  return jax.freeze(rows_ref)


def _hopper_kernel(spec: mosaic_hopper.Spec) -> Callable[..., Any]:
  """Returns the kernel; its arguments are those of `mosaic_hopper.Inputs`."""
  sizes, dtype = spec.sizes, jnp.dtype(spec.shape.dtype)
  rows = mosaic_hopper.WARPGROUPS, mosaic_hopper.ROWS, spec.shape.head_dim
  ring = sizes.num_stages, sizes.block_n, spec.shape.head_dim
  barriers: Any = functools.partial(
    plgpu.Barrier, num_barriers=sizes.num_stages
  )
  copies = max(sizes.block_n // spec.shape.page_size, 1)
  warpgroups = mosaic_hopper.WARPGROUPS

  def attend_chunks(*refs: Any) -> None:
    num_inputs = len(mosaic_hopper.Inputs._fields)
    mosaic_hopper.run(
      spec,
      mosaic_hopper.Inputs(*refs[:num_inputs]),
      mosaic_hopper.Scratch(*refs[num_inputs:]),
    )

  kernel: Callable[..., Any] = plgpu.kernel(
    attend_chunks,
    out_type=(),
    grid=(sizes.num_blocks,),
    grid_names=('block',),
    num_threads=warpgroups + 1,
    thread_name='thread',
    scratch_types=mosaic_hopper.Scratch(
      rows=plgpu.SMEM(rows, dtype),
      q=plgpu.SMEM(rows, dtype, **_TILED),
      k=plgpu.SMEM(ring, dtype, **_TILED),
      v=plgpu.SMEM(ring, dtype, **_TILED),
      q_there=plgpu.Barrier(num_barriers=warpgroups),
      k_there=barriers(num_arrivals=copies),
      v_there=barriers(num_arrivals=copies),
      k_free=barriers(num_arrivals=warpgroups),
      v_free=barriers(num_arrivals=warpgroups),
    ),
    compiler_params=plgpu.CompilerParams(approx_math=True),
    interpret=plgpu.InterpretGPUParams() if sizes.interpret else None,
  )
  return kernel
