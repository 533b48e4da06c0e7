# SPDX-License-Identifier: Apache-2.0
"""Pallas, lowered to Triton: NVIDIA GPUs from Ampere on.

One launch does a hybrid batch by its plan (see `plan`): a block of the GPU
takes a work item and a KV head, keeps a tile of query rows in registers, and
walks over blocks of keys and values with the online softmax of
FlashAttention-2 (arXiv 2307.08691). A second launch merges the partial
results of split decodes.

A ref is a reference to an array in the GPU's memory. Shape letters are those
of `api`; W, M are those of `plan.Plan`. B is the number of slots for partial
results, R the rows of a narrow tile (Tiling.narrow_rows).

On CPUs it runs in Pallas's interpreter, for tests.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import struct
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
import jax.numpy as jnp

from pallas_kernels import devices
from pallas_kernels.ragged_paged_attention import batch as batch_lib
from pallas_kernels.ragged_paged_attention import plan as plan_lib
from pallas_kernels.ragged_paged_attention import quantization
from pallas_kernels.ragged_paged_attention import tuning
from pallas_kernels.ragged_paged_attention import validate

_MASKED = -1e30  # finite: the difference of two of them is no NaN


def make_plan(
  kv_lens: jax.Array,
  cu_q_lens: jax.Array,
  distribution: jax.Array,
  *,
  num_tokens: int,
  sliding_window: int | None,
  sizes: tuning.Sizes,
  shape: tuning.Shape,
  batch_invariant: bool = False,
) -> plan_lib.Plan:
  """Plans a traced batch, for all layers of one window."""
  return plan_lib.make(
    kv_lens,
    cu_q_lens,
    distribution,
    tiling=_tiling(sizes, shape, batch_invariant),
    num_tokens=num_tokens,
    group=shape.group,
    sliding_window=sliding_window,
    xp=jnp,
  )


def _tiling(
  sizes: tuning.Sizes, shape: tuning.Shape, batch_invariant: bool
) -> plan_lib.Tiling:
  tiling = sizes.tiling(shape)
  return dataclasses.replace(tiling, has_narrow=not batch_invariant)


def ragged_paged_attention(
  q: jax.Array,
  k_pages: quantization.Pages,
  v_pages: quantization.Pages,
  batch: batch_lib.Batch,
  options: batch_lib.Options,
  *,
  plan: plan_lib.Plan | None = None,
  sizes: tuning.Sizes | None = None,
) -> jax.Array:
  """Attends as `api.ragged_paged_attention`; pages are rows (see `layout`).

  Args:
    q, k_pages, v_pages, batch, options: see there.
    plan: of `make_plan` for the same sizes; None makes it here.
    sizes: None for those that `tuning` has for the default device.

  Raises:
    NotImplementedError: the kernel doesn't support the shapes.
    ValueError: the plan is for other shapes.
  """
  shape = tuning.Shape.of(q, k_pages)
  sizes = sizes or tuning.choose(shape)
  if plan is None:
    plan = make_plan(
      batch.kv_lens,
      batch.cu_q_lens,
      batch.distribution,
      num_tokens=q.shape[0],
      sliding_window=options.sliding_window,
      sizes=sizes,
      shape=shape,
      batch_invariant=options.batch_invariant,
    )
  validate.check(
    isinstance(plan, plan_lib.Plan),
    'plan',
    type(plan).__name__,
    'must be of make_plan for this implementation',
  )
  items = sizes.tiling(shape).num_work_items(
    q.shape[0], len(batch.kv_lens), shape.group
  )
  validate.check(
    len(plan.rows) == items,
    'plan',
    f'{len(plan.rows)} items',
    f'must be of make_plan for these arguments, {items}',
  )
  launch = functools.partial(_launch, shape=shape, sizes=sizes, options=options)
  return devices.launch(launch, q, k_pages, v_pages, batch, plan)


def _launch(
  q: jax.Array,
  k_pages: quantization.Pages,
  v_pages: quantization.Pages,
  batch: batch_lib.Batch,
  plan: plan_lib.Plan,
  *,
  shape: tuning.Shape,
  sizes: tuning.Sizes,
  options: batch_lib.Options,
  interpret: bool,
) -> jax.Array:
  """Launches both kernels. The output replaces q, row by row."""
  heads = shape.num_kv_heads
  tiling = _tiling(sizes, shape, options.batch_invariant)
  num_items, num_merges = len(plan.rows), len(plan.merge_seq)
  slots = (
    tiling.num_narrow(q.shape[0], len(batch.kv_lens), shape.group)
    + tiling.num_items
  )
  partial = (slots, heads, tiling.narrow_rows)
  params = plgpu.CompilerParams(
    num_warps=sizes.num_warps, num_stages=sizes.num_stages
  )
  out, *partials = pl.pallas_call(
    functools.partial(
      _attend,
      shape=shape,
      tiling=tiling,
      options=options,
      interpret=interpret,
    ),
    grid=(num_items * heads,),
    out_shape=[
      jax.ShapeDtypeStruct(q.shape, q.dtype),
      jax.ShapeDtypeStruct((*partial, shape.head_dim), jnp.float32),
      jax.ShapeDtypeStruct(partial, jnp.float32),
      jax.ShapeDtypeStruct(partial, jnp.float32),
    ],
    input_output_aliases={0: 0},
    compiler_params=params,
    interpret=interpret,
    name='ragged_paged_attention',
  )(q, k_pages, v_pages, *batch[:3], *plan[:6])
  if not tiling.has_narrow:  # Nothing is split.
    return out
  return pl.pallas_call(
    functools.partial(_merge, shape=shape, rows=tiling.narrow_rows),
    grid=(num_merges * heads,),
    out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
    input_output_aliases={0: 0},
    interpret=interpret,
    compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
    name='merge_splits',
  )(out, *partials, batch.cu_q_lens, *plan[6:])


def _attend(
  q_ref: Any,
  k_ref: Any,
  v_ref: Any,
  kv_lens_ref: Any,
  pages_ref: Any,
  starts_ref: Any,
  rows_ref: Any,
  *refs: Any,
  shape: tuning.Shape,
  tiling: plan_lib.Tiling,
  options: batch_lib.Options,
  interpret: bool,
) -> None:
  """Does one work item for one KV head: the kernel's entry.

  Args:
    q_ref: [T, H, h], queries.
    k_ref: [N, K, page_size, h], keys; or a `Quantized` of such refs, with
      scales [N, K, page_size].
    v_ref: like k_ref, values.
    kv_lens_ref: [S] int32.
    pages_ref: [S, P] int32, the page table.
    starts_ref: [S + 1] int32, `cu_q_lens`.
    rows_ref: [W] int32, `Plan.rows`.
    *refs: the rest, from `seq_ref` on, of `_attend_tile`.
    shape: what the kernel is compiled for.
    tiling: how the work is cut.
    options: of the attention.
    interpret: see `_weights`.
  """
  item = pl.program_id(0) // shape.num_kv_heads
  head = pl.program_id(0) % shape.num_kv_heads
  rows = rows_ref[item]
  for size in tiling.row_counts:
    pl.when(rows == size)(
      functools.partial(
        _attend_tile,
        item,
        head,
        q_ref,
        k_ref,
        v_ref,
        kv_lens_ref,
        pages_ref,
        starts_ref,
        *refs,
        num_rows=size,
        may_split=tiling.has_narrow and size == tiling.narrow_rows,
        shape=shape,
        block_n=tiling.block_n,
        options=options,
        interpret=interpret,
      )
    )


# Does a work item's tile of `num_rows` rows for one KV head. Its result may be
# partial if `may_split`. For the refs up to `starts_ref` see `_attend`.
#   seq_ref, first_row_ref, start_ref, stop_ref, slot_ref: [W] int32, of `Plan`.
#   out_ref: [T, H, h], outputs; the same memory as q_ref.
#   acc_ref: [B, K, R, h] float32, partial sums of weighted values.
#   top_ref: [B, K, R] float32, the highest scores of the partial sums, times
#     log2(e).
#   norm_ref: [B, K, R] float32, their sums of weights.
def _attend_tile(
  item: jax.Array,
  head: jax.Array,
  q_ref: Any,
  k_ref: Any,
  v_ref: Any,
  kv_lens_ref: Any,
  pages_ref: Any,
  starts_ref: Any,
  seq_ref: Any,
  first_row_ref: Any,
  start_ref: Any,
  stop_ref: Any,
  slot_ref: Any,
  out_ref: Any,
  acc_ref: Any,
  top_ref: Any,
  norm_ref: Any,
  *,
  num_rows: int,
  may_split: bool,
  shape: tuning.Shape,
  block_n: int,
  options: batch_lib.Options,
  interpret: bool,
) -> None:
  scale, window = options.scale, options.sliding_window
  factor = math.log2(math.e) * (scale if options.soft_cap is None else 1.0)
  weigh = functools.partial(_weights, factor=factor, interpret=interpret)
  seq, start, stop = seq_ref[item], start_ref[item], stop_ref[item]
  tokens, heads, query = _rows(
    starts_ref, seq, first_row_ref[item], head, num_rows, shape.group
  )
  kv_len = kv_lens_ref[seq]
  past = kv_len - (starts_ref[seq + 1] - starts_ref[seq])
  q_at = past + query
  queries = [
    plgpu.load(q_ref.at[tokens[:, None], heads[:, None], d[None]])
    for d in shape.channels()
  ]
  dot: Any = functools.partial(plgpu.dot, **shape.dot_options)
  # A weight times the scale of small values may be too small for float16;
  # bfloat16 holds it, and every value that is kept in a byte.
  mixing = shape.dtype
  if mixing == 'float16' and isinstance(v_ref, quantization.Quantized):
    mixing = 'bfloat16'

  def body(masked: bool, j: jax.Array, state: Any) -> Any:
    acc, top, norm, page = state
    # Loaded a turn ahead: otherwise the loads of keys would wait for it, and
    # the compiler could not overlap them with the turn before.
    next_page = pages_ref[
      seq, jnp.minimum(j + 1, stop - 1) // (shape.page_size // block_n)
    ]
    at = j * block_n + jnp.arange(block_n, dtype=jnp.int32)
    place = pl.ds((j % (shape.page_size // block_n)) * block_n, block_n)

    def load(ref: Any, *dims: int) -> jax.Array:
      """Loads [block_n, *dims]; positions that were not written are 0."""
      if not masked:
        return plgpu.load(ref)
      written = (at < kv_len).reshape(-1, *[1] * len(dims))
      return plgpu.load(
        ref,
        mask=jnp.broadcast_to(written, (block_n, *dims)),
        other=jnp.zeros((), ref.dtype),
      )

    def load_block(pages: Any, dtype: str) -> list[jax.Array]:
      """Loads the block's channels: [block_n, size] for each piece."""
      ref = quantization.values_of(pages)
      return [
        quantization.decode(
          load(ref.at[page, head, place, pl.ds(first, size)], size), dtype
        )
        for first, size in shape.pieces
      ]

    def scaled(x: jax.Array, pages: Any) -> jax.Array:
      """Multiplies x, [rows, block_n], by the scale of each position."""
      if not isinstance(pages, quantization.Quantized):
        return x
      return x * load(pages.scales.at[page, head, place])[None]

    parts = zip(queries, load_block(k_ref, shape.dtype), strict=True)
    scores = functools.reduce(operator.add, (dot(x, k.T) for x, k in parts))
    scores = scaled(scores, k_ref)
    if (cap := options.soft_cap) is not None:
      scores = cap * jnp.tanh(scores * (scale / cap))
    if masked:
      seen = at[None] <= q_at[:, None]
      if window is not None:
        seen &= at[None] > q_at[:, None] - window
      scores = jnp.where(seen, scores, _MASKED)
    new_top = jnp.maximum(top, scores.max(axis=1))
    # Where a row sees nothing yet, its top's rounded product would not cancel.
    reached = jnp.where(new_top > _MASKED, new_top, 0.0) if masked else new_top
    decay = weigh(top, reached)
    weights = weigh(scores, reached)
    factors = scaled(weights, v_ref).astype(mixing)
    acc = [
      a * decay[:, None] + dot(factors, v)
      for a, v in zip(acc, load_block(v_ref, mixing), strict=True)
    ]
    return acc, new_top, norm * decay + weights.sum(axis=1), next_page

  # The blocks that all rows see entirely need no mask.
  last = first_row_ref[item] + num_rows - 1
  full_stop = jnp.clip(
    (past + first_row_ref[item] // shape.group + 1) // block_n, start, stop
  )
  if options.batch_invariant:  # Whether all see one depends on the tile.
    full_stop = start
  state = (
    [jnp.zeros((num_rows, size), jnp.float32) for _, size in shape.pieces],
    jnp.full((num_rows,), _MASKED, jnp.float32),
    jnp.zeros((num_rows,), jnp.float32),
    pages_ref[seq, start // (shape.page_size // block_n)],
  )
  full_start = start
  if window is not None:
    oldest = past + last // shape.group - window + 1
    full_start = jnp.clip((oldest + block_n - 1) // block_n, start, full_stop)
    state = lax.fori_loop(
      start, full_start, functools.partial(body, True), state
    )
  state = lax.fori_loop(
    full_start, full_stop, functools.partial(body, False), state
  )
  acc, top, norm, _ = lax.fori_loop(
    full_stop, stop, functools.partial(body, True), state
  )

  slot = slot_ref[item]

  def store_result() -> None:
    for d, a in zip(shape.channels(), acc, strict=True):
      plgpu.store(
        out_ref.at[tokens[:, None], heads[:, None], d[None]],
        (a / norm[:, None]).astype(out_ref.dtype),
      )

  def store_partial() -> None:
    for (first, size), a in zip(shape.pieces, acc, strict=True):
      plgpu.store(acc_ref.at[slot, head, :, pl.ds(first, size)], a)
    plgpu.store(top_ref.at[slot, head, :], top * factor)
    plgpu.store(norm_ref.at[slot, head, :], norm)

  if not may_split:
    store_result()
  else:
    pl.when(slot < 0)(store_result)
    pl.when(slot >= 0)(store_partial)


def _weights(
  scores: jax.Array, tops: jax.Array, *, factor: float, interpret: bool
) -> jax.Array:
  """Returns 2 ** ((scores - tops) * factor).

  A GPU takes two instructions for it, if told so: by itself it keeps product
  and difference apart, and multiplies twice more for results that are denormal,
  which are 0 here.

  Args:
    scores: [rows, ...] float32.
    tops: [rows] float32, not so large that what their product is rounded by
      matters.
    factor: see above.
    interpret: whether Pallas interprets the kernel, as it does on CPUs.
  """
  tops = tops.reshape(-1, *[1] * (scores.ndim - 1))
  if interpret:
    return jnp.exp2((scores - tops) * factor)
  (bits,) = struct.unpack('>I', struct.pack('>f', factor))
  (result,) = plgpu.elementwise_inline_asm(
    f"""{{
    .reg .f32 power;
    fma.rn.ftz.f32 power, $1, 0f{bits:08X}, $2;
    ex2.approx.ftz.f32 $0, power;
    }}""",
    args=[scores, jnp.broadcast_to(tops * -factor, scores.shape)],
    constraints='=f,f,f',
    pack=1,
    result_shape_dtypes=[jax.ShapeDtypeStruct(scores.shape, scores.dtype)],
  )
  return result


def _merge(
  old_out_ref: Any,
  acc_ref: Any,
  top_ref: Any,
  norm_ref: Any,
  starts_ref: Any,
  seq_ref: Any,
  row_ref: Any,
  slot_ref: Any,
  count_ref: Any,
  out_ref: Any,
  *,
  shape: tuning.Shape,
  rows: int,
) -> None:
  """Merges the partial results of a narrow tile, for one KV head.

  Args:
    old_out_ref: [T, H, h], the same memory as out_ref.
    acc_ref: [B, K, R, h] float32; see `_attend_tile`.
    top_ref, norm_ref: [B, K, R] float32.
    starts_ref: [S + 1] int32, `cu_q_lens`.
    seq_ref, row_ref, slot_ref, count_ref: [M] int32: the sequence and
      `Plan.merge_row`, `merge_slot` and `merge_count` of each narrow tile.
    out_ref: [T, H, h], outputs.
    shape: what the kernel is compiled for.
    rows: R.
  """
  del old_out_ref  # It is out_ref.
  tile = pl.program_id(0) // shape.num_kv_heads
  head = pl.program_id(0) % shape.num_kv_heads
  count, slot = count_ref[tile], slot_ref[tile]

  def body(i: jax.Array, state: Any) -> Any:
    acc, top, norm = state
    new = plgpu.load(top_ref.at[slot + i, head, :])
    new_top = jnp.maximum(top, new)
    old_weight, weight = jnp.exp2(top - new_top), jnp.exp2(new - new_top)
    acc = [
      a * old_weight[:, None]
      + weight[:, None]
      * plgpu.load(acc_ref.at[slot + i, head, :, pl.ds(first, size)])
      for a, (first, size) in zip(acc, shape.pieces, strict=True)
    ]
    return (
      acc,
      new_top,
      norm * old_weight + weight * plgpu.load(norm_ref.at[slot + i, head, :]),
    )

  @pl.when(count > 0)
  def put_together() -> None:
    acc, _, norm = lax.fori_loop(
      0,
      count,
      body,
      (
        [jnp.zeros((rows, size), jnp.float32) for _, size in shape.pieces],
        jnp.full((rows,), _MASKED, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
      ),
    )
    tokens, heads, _ = _rows(
      starts_ref, seq_ref[tile], row_ref[tile], head, rows, shape.group
    )
    for d, a in zip(shape.channels(), acc, strict=True):
      plgpu.store(
        out_ref.at[tokens[:, None], heads[:, None], d[None]],
        (a / norm[:, None]).astype(out_ref.dtype),
      )


def _rows(
  starts_ref: Any,
  seq: jax.Array,
  first_row: jax.Array,
  head: jax.Array,
  num_rows: int,
  group: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns the token, head and query of each row of a tile, [num_rows] each.

  Rows beyond the sequence repeat its last row: they compute and store the
  same, so that neither loads nor stores need a mask.

  Args:
    starts_ref: [S + 1] int32, `cu_q_lens`.
    seq: the sequence.
    first_row: of the tile, in the sequence's rows.
    head: the KV head.
    num_rows: rows of the tile.
    group: H / K.
  """
  start, stop = starts_ref[seq], starts_ref[seq + 1]
  row = jnp.minimum(
    first_row + jnp.arange(num_rows, dtype=jnp.int32),
    (stop - start) * group - 1,
  )
  query = row // group
  return start + query, head * group + row % group, query
