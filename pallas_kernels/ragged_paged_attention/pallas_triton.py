# SPDX-License-Identifier: Apache-2.0
"""Pallas, lowered to Triton: NVIDIA GPUs from Ampere on.

A hybrid batch is done by its plan (see `plan`): by one launch its small
sequences, by another its chunks of prefills, each with tiles of its own sizes;
a third merges the partial results of split decodes. Blocks of the GPU, a few
for each multiprocessor, take work items in turn. For an item and a KV head a
block keeps a tile of query rows in registers, and walks over blocks of keys and
values with the online softmax of FlashAttention-2 (arXiv 2307.08691).

A ref is a reference to an array in the GPU's memory. Shape letters are those
of `api`; W, M are those of `plan.Small` and `plan.Chunks`. R is the number of
rows of a tile.

On CPUs it runs in Pallas's interpreter, for tests.
"""

from __future__ import annotations

from collections.abc import Callable
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
from pallas_kernels import unpacking
from pallas_kernels.ragged_paged_attention import batch as batch_lib
from pallas_kernels.ragged_paged_attention import merging
from pallas_kernels.ragged_paged_attention import plan as plan_lib
from pallas_kernels.ragged_paged_attention import quantization
from pallas_kernels.ragged_paged_attention import tuning
from pallas_kernels.ragged_paged_attention import validate


def make_plan(
  kv_lens: jax.Array,
  cu_q_lens: jax.Array,
  distribution: jax.Array,
  *,
  num_tokens: int,
  sliding_window: int | None,
  sizes: tuning.Sizes,
  shape: tuning.Shape,
  decodes_only: bool = False,
  batch_invariant: bool = False,
) -> plan_lib.Plan:
  """Plans a traced batch, for all layers of one window."""
  batch: Any = dict(
    kv_lens=kv_lens,
    cu_q_lens=cu_q_lens,
    distribution=distribution,
    num_tokens=num_tokens,
    group=shape.group,
    sliding_window=sliding_window,
    xp=jnp,
  )
  tiling = sizes.tiling
  small = chunks = None
  if not batch_invariant:
    small = plan_lib.make_small(**batch, tiling=tiling)
  if batch_invariant or not decodes_only:
    chunks = plan_lib.make_chunks(
      **batch,
      rows=sizes.chunks.rows,
      block_n=sizes.chunks.block_n,
      small=None if batch_invariant else tiling.most_queries(shape.group),
    )
  return plan_lib.Plan(small, chunks)


def ragged_paged_attention(
  q: jax.Array,
  k_pages: quantization.Pages,
  v_pages: quantization.Pages,
  batch: batch_lib.Batch,
  options: batch_lib.Options,
  *,
  plan: plan_lib.Plan | None = None,
  sinks: jax.Array | None = None,
  sizes: tuning.Sizes | None = None,
) -> jax.Array:
  """Attends as `api.ragged_paged_attention`; pages are rows (see `layout`).

  Args:
    q, k_pages, v_pages, batch, options: see there.
    plan: of `make_plan` for the same sizes, or a part of one, by which only the
      outputs of its sequences take the place of their queries; None makes it.
    sinks: see `api.ragged_paged_attention`.
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
  sized = q.shape[0], len(batch.kv_lens), shape.group
  for part, items in (
    (plan.small, sizes.tiling.num_work_items(*sized)),
    (plan.chunks, plan_lib.num_chunks(sizes.chunks.rows, *sized)),
  ):
    validate.check(
      part is None or len(part.seq) == items,
      'plan',
      f'{part and len(part.seq)} items',
      f'must be of make_plan for these arguments, {items}',
    )
  launch = functools.partial(_launch, shape=shape, sizes=sizes, options=options)
  if sinks is not None:
    sinks = sinks.astype(jnp.float32)
  return devices.launch(launch, q, k_pages, v_pages, batch, plan, sinks)


def _launch(
  q: jax.Array,
  k_pages: quantization.Pages,
  v_pages: quantization.Pages,
  batch: batch_lib.Batch,
  plan: plan_lib.Plan,
  sinks: jax.Array | None,
  *,
  shape: tuning.Shape,
  sizes: tuning.Sizes,
  options: batch_lib.Options,
  interpret: bool,
) -> jax.Array:
  """Launches the kernels. Outputs replace queries, row by row."""

  def call(
    kernel: Callable[..., None], tile: tuning.Tile, name: str, *partials: Any
  ) -> Any:
    return pl.pallas_call(
      functools.partial(
        kernel,
        tile=tile,
        shape=shape,
        options=options,
        interpret=interpret,
      ),
      grid=(tile.num_blocks,),
      out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), *partials],
      input_output_aliases={0: 0},
      compiler_params=plgpu.CompilerParams(
        num_warps=tile.num_warps, num_stages=tile.num_stages
      ),
      interpret=interpret,
      name=name,
    )

  # No sinks are no argument.
  arguments = (k_pages, v_pages, *batch[:3], sinks)
  if (small := plan.small) is not None:
    tile = sizes.small
    partial = len(small.seq), shape.num_kv_heads, tile.rows
    q, *partials = call(
      _attend_small,
      tile,
      'attend_small',
      *(
        jax.ShapeDtypeStruct(size, jnp.float32)
        for size in ((*partial, shape.head_dim), partial, partial)
      ),
    )(q, *arguments, *small[:6])
    (q,) = call(merging.merge, sizes.merge, 'merge_splits')(
      q, *partials, batch.cu_q_lens, sinks, *small[6:]
    )
  if (chunks := plan.chunks) is not None:
    (q,) = call(_attend_chunks, sizes.chunks, 'attend_chunks')(
      q, *arguments, *chunks
    )
  return q


def _attend_small(
  q_ref: Any,
  k_ref: Any,
  v_ref: Any,
  kv_lens_ref: Any,
  pages_ref: Any,
  starts_ref: Any,
  sinks_ref: Any,
  seq_ref: Any,
  first_row_ref: Any,
  start_ref: Any,
  stop_ref: Any,
  slot_ref: Any,
  count_ref: Any,
  out_ref: Any,
  acc_ref: Any,
  top_ref: Any,
  norm_ref: Any,
  *,
  tile: tuning.Tile,
  shape: tuning.Shape,
  **constants: Any,
) -> None:
  """Attends of small sequences: a kernel's entry.

  Args:
    q_ref: [T, H, h], queries.
    k_ref: [N, K, page_size, h], keys; or a `Quantized` of such refs, with
      scales [N, K, page_size].
    v_ref: like k_ref, values.
    kv_lens_ref: [S] int32.
    pages_ref: [S, P] int32, the page table.
    starts_ref: [S + 1] int32, `cu_q_lens`.
    sinks_ref: [H] float32; None: there are none.
    seq_ref, first_row_ref, start_ref, stop_ref, slot_ref: [W] int32, of
      `plan.Small`.
    count_ref: [1] int32, of it.
    out_ref: [T, H, h], outputs; the same memory as q_ref.
    acc_ref: [W, K, R, h] float32, partial sums of weighted values.
    top_ref: [W, K, R] float32, the highest scores of the partial sums, times
      log2(e).
    norm_ref: [W, K, R] float32, their sums of weights.
    tile: its sizes.
    shape: what the kernel is compiled for.
    **constants: see `_attend`.
  """

  def attend(turn: jax.Array) -> None:
    item, head = turn // shape.num_kv_heads, turn % shape.num_kv_heads
    seq, first_row = seq_ref[item], first_row_ref[item]
    acc, top, norm = _attend(
      q_ref,
      k_ref,
      v_ref,
      kv_lens_ref,
      pages_ref,
      starts_ref,
      seq,
      first_row,
      start_ref[item],
      stop_ref[item],
      head,
      tile=tile,
      shape=shape,
      **constants,
    )
    slot = slot_ref[item]

    @pl.when(slot < 0)
    def store_result() -> None:
      tokens, heads, _ = _rows(
        starts_ref, seq, first_row, head, tile.rows, shape.group
      )
      whole = merging.add_sinks(norm, top, sinks_ref, heads)
      _store(out_ref, tokens, heads, acc, whole, shape)

    @pl.when(slot >= 0)
    def store_partial() -> None:
      for (first, size), a in zip(shape.pieces, acc, strict=True):
        plgpu.store(acc_ref.at[slot, head, :, pl.ds(first, size)], a)
      plgpu.store(top_ref.at[slot, head, :], top)
      plgpu.store(norm_ref.at[slot, head, :], norm)

  merging.take_turns(count_ref[0] * shape.num_kv_heads, attend)


def _attend_chunks(
  q_ref: Any,
  k_ref: Any,
  v_ref: Any,
  kv_lens_ref: Any,
  pages_ref: Any,
  starts_ref: Any,
  sinks_ref: Any,
  seq_ref: Any,
  first_row_ref: Any,
  start_ref: Any,
  stop_ref: Any,
  count_ref: Any,
  out_ref: Any,
  *,
  tile: tuning.Tile,
  shape: tuning.Shape,
  **constants: Any,
) -> None:
  """Attends of chunks of prefills: a kernel's entry.

  Args:
    q_ref, k_ref, v_ref, kv_lens_ref, pages_ref, starts_ref, sinks_ref: see
      `_attend_small`.
    seq_ref, first_row_ref, start_ref, stop_ref: [W] int32, of `plan.Chunks`.
    count_ref: [1] int32, of it.
    out_ref: [T, H, h], outputs; the same memory as q_ref.
    tile, shape, **constants: see `_attend_small`.
  """

  def attend(turn: jax.Array) -> None:
    item, head = turn // shape.num_kv_heads, turn % shape.num_kv_heads
    seq, first_row = seq_ref[item], first_row_ref[item]
    acc, top, norm = _attend(
      q_ref,
      k_ref,
      v_ref,
      kv_lens_ref,
      pages_ref,
      starts_ref,
      seq,
      first_row,
      start_ref[item],
      stop_ref[item],
      head,
      tile=tile,
      shape=shape,
      **constants,
    )
    tokens, heads, _ = _rows(
      starts_ref, seq, first_row, head, tile.rows, shape.group
    )
    norm = merging.add_sinks(norm, top, sinks_ref, heads)
    _store(out_ref, tokens, heads, acc, norm, shape)

  merging.take_turns(count_ref[0] * shape.num_kv_heads, attend)


def _store(
  out_ref: Any,
  tokens: jax.Array,
  heads: jax.Array,
  acc: list[jax.Array],
  norm: jax.Array,
  shape: tuning.Shape,
) -> None:
  """Stores the outputs of a tile's rows; see `_rows` and `_attend`."""
  for d, a in zip(shape.channels(), acc, strict=True):
    plgpu.store(
      out_ref.at[tokens[:, None], heads[:, None], d[None]],
      (a / norm[:, None]).astype(out_ref.dtype),
    )


def _attend(
  q_ref: Any,
  k_ref: Any,
  v_ref: Any,
  kv_lens_ref: Any,
  pages_ref: Any,
  starts_ref: Any,
  seq: jax.Array,
  first_row: jax.Array,
  start: jax.Array,
  stop: jax.Array,
  head: jax.Array,
  *,
  tile: tuning.Tile,
  shape: tuning.Shape,
  options: batch_lib.Options,
  interpret: bool,
) -> tuple[list[jax.Array], jax.Array, jax.Array]:
  """Attends of a tile's rows of one KV head to a range of key blocks.

  Args:
    q_ref, k_ref, v_ref, kv_lens_ref, pages_ref, starts_ref: see
      `_attend_small`.
    seq, first_row, start, stop: the work item's, see `plan`.
    head: the KV head.
    tile, shape: see `_attend_small`.
    options: of the attention.
    interpret: whether Pallas interprets the kernel, as it does on CPUs.

  Returns:
    Sums of weighted values, [R, size] for each of `shape.pieces`; the highest
    scores, times log2(e), [R]; and the sums of weights, [R]. All are float32.
  """
  scale, window = options.scale, options.sliding_window
  factor = math.log2(math.e) * (scale if options.soft_cap is None else 1.0)
  weigh = functools.partial(_weights, factor=factor, interpret=interpret)
  block_n = tile.block_n
  tokens, heads, query = _rows(
    starts_ref, seq, first_row, head, tile.rows, shape.group
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

    def load_block(pages: Any, dtype: str, once: bool) -> list[jax.Array]:
      """Loads the block's channels: [block_n, size] for each piece."""
      ref = quantization.values_of(pages)
      return [
        unpacking.unpack(
          load(ref.at[page, head, place, pl.ds(first, size)], size),
          dtype,
          once=page >= 0 if once else None,
          interpret=interpret,
        )
        for first, size in shape.pieces
      ]

    def scaled(x: jax.Array, pages: Any) -> jax.Array:
      """Multiplies x, [rows, block_n], by the scale of each position."""
      if not isinstance(pages, quantization.Quantized):
        return x
      return x * load(pages.scales.at[page, head, place])[None]

    # Of larger heads, registers would spill. Warps of few rows have keys of
    # their own.
    once = shape.head_dim <= 128
    keys = load_block(k_ref, shape.dtype, once and tile.rows >= 128)
    parts = zip(queries, keys, strict=True)
    scores = functools.reduce(operator.add, (dot(x, k.T) for x, k in parts))
    scores = scaled(scores, k_ref)
    if (cap := options.soft_cap) is not None:
      scores = cap * jnp.tanh(scores * (scale / cap))
    if masked:
      seen = at[None] <= q_at[:, None]
      if window is not None:
        seen &= at[None] > q_at[:, None] - window
      scores = jnp.where(seen, scores, merging.MASKED)
    new_top = jnp.maximum(top, scores.max(axis=1))
    # Where a row sees nothing yet, its top's rounded product would not cancel.
    reached = (
      jnp.where(new_top > merging.MASKED, new_top, 0.0) if masked else new_top
    )
    decay = weigh(top, reached)
    weights = weigh(scores, reached)
    factors = scaled(weights, v_ref).astype(mixing)
    acc = [
      a * decay[:, None] + dot(factors, v)
      for a, v in zip(acc, load_block(v_ref, mixing, once), strict=True)
    ]
    return acc, new_top, norm * decay + weights.sum(axis=1), next_page

  # The blocks that all rows see entirely need no mask.
  full_stop = jnp.clip(
    (past + first_row // shape.group + 1) // block_n, start, stop
  )
  if options.batch_invariant:  # Whether all see one depends on the tile.
    full_stop = start
  state = (
    [jnp.zeros((tile.rows, size), jnp.float32) for _, size in shape.pieces],
    jnp.full((tile.rows,), merging.MASKED, jnp.float32),
    jnp.zeros((tile.rows,), jnp.float32),
    pages_ref[seq, start // (shape.page_size // block_n)],
  )
  full_start = start
  if window is not None:
    last = first_row + tile.rows - 1
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
  return acc, top * factor, norm


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
