# SPDX-License-Identifier: Apache-2.0
"""The body of `pallas_mosaic`'s kernel for Hopper: wgmma and TMA.

A ref is a reference to an array in the GPU's global or shared memory. Shape
letters are those of `api`; W is the number of tiles in `plan.Chunks`.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu
import jax.numpy as jnp

from pallas_kernels import mosaic_rows
from pallas_kernels.ragged_paged_attention import batch as batch_lib
from pallas_kernels.ragged_paged_attention import mosaic_registers as registers
from pallas_kernels.ragged_paged_attention import tuning

plgpu: Any = mosaic_gpu  # JAX 0.10 lacks half of it.
ROWS = mosaic_rows.ROWS
WARPGROUPS = 2  # those that compute
# Registers of a thread: those that fetch lend theirs to those that compute.
_FETCH_REGISTERS, _COMPUTE_REGISTERS = 24, 240


@dataclasses.dataclass(frozen=True, slots=True)
class Spec:
  """What the kernel is compiled for.

  Attributes:
    shape: see `tuning.Shape`.
    sizes: see `tuning.MosaicSizes`.
    options: see `batch.Options`.
    num_heads: H.
  """

  shape: tuning.Shape
  sizes: tuning.MosaicSizes
  options: batch_lib.Options
  num_heads: int


class Inputs(NamedTuple):
  """Refs in the device's memory; see `batch.Batch`, `plan.Chunks`."""

  rows: Any  # [T, H, h], queries, which outputs replace
  k_pages: Any  # [N, K, page_size, h]
  v_pages: Any  # [N, K, page_size, h]
  kv_lens: Any  # [S] int32
  page_indices: Any  # [S, P] int32
  cu_q_lens: Any  # [S + 1] int32
  seq: Any  # [W] int32
  first_query: Any  # [W] int32
  start: Any  # [W] int32
  stop: Any  # [W] int32
  count: Any  # [1] int32


class Scratch(NamedTuple):
  """Refs in a block's shared memory, and barriers in it."""

  rows: Any  # [WARPGROUPS, ROWS, h], laid out for TMA to copy any row
  q: Any  # [WARPGROUPS, ROWS, h], laid out for wgmma
  k: Any  # [num_stages, block_n, h]
  v: Any  # [num_stages, block_n, h]
  q_there: Any  # [WARPGROUPS] barriers: the queries have arrived
  k_there: Any  # [num_stages] barriers: a stage's keys have arrived
  v_there: Any  # [num_stages] barriers: a stage's values have arrived
  k_free: Any  # [num_stages] barriers: a stage's keys were read
  v_free: Any  # [num_stages] barriers: a stage's values were read


def run(spec: Spec, inputs: Inputs, scratch: Scratch) -> None:
  """Runs a block of the GPU: two warpgroups compute, one fetches."""
  thread = lax.axis_index('thread')
  pl.when(thread == WARPGROUPS)(
    functools.partial(_fetch, spec, inputs, scratch)
  )
  pl.when(thread < WARPGROUPS)(
    functools.partial(_compute, spec, inputs, scratch, thread)
  )


def _for_work(
  spec: Spec,
  inputs: Inputs,
  do: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
) -> jax.Array:
  """Does this block's share of the tiles, for all heads of each in turn.

  Args:
    spec: of the kernel.
    inputs: its inputs.
    do: takes the number of a tile of `plan.Chunks`, the first head to do it
      for, and the count of key blocks that this block of the GPU has done;
      does the tile, and returns the new count.

  Returns:
    The count of key blocks in the end.
  """
  num_blocks = spec.sizes.num_blocks
  units = spec.num_heads // spec.sizes.heads  # of a tile
  block = lax.axis_index('block')
  total = inputs.count[0] * units
  turns = lax.div(total - block + (num_blocks - 1), jnp.int32(num_blocks))

  def turn(i: jax.Array, num_done: jax.Array) -> jax.Array:
    work = i * num_blocks + block
    return do(
      lax.div(work, jnp.int32(units)),
      lax.rem(work, jnp.int32(units)) * spec.sizes.heads,
      num_done,
    )

  return lax.fori_loop(0, turns, turn, jnp.int32(0))


def _fetch(spec: Spec, inputs: Inputs, scratch: Scratch) -> None:
  """Brings the keys and values of all tiles into the ring, block by block."""
  plgpu.set_max_registers(_FETCH_REGISTERS, action='decrease')
  stages, block_n = spec.sizes.num_stages, spec.sizes.block_n
  page_size = spec.shape.page_size
  rings = (
    (inputs.k_pages, scratch.k, scratch.k_there, scratch.k_free),
    (inputs.v_pages, scratch.v, scratch.v_there, scratch.v_free),
  )

  def tile(item: jax.Array, head: jax.Array, num_done: jax.Array) -> jax.Array:
    kv_head = lax.div(head, jnp.int32(spec.shape.group))
    seq = inputs.seq[item]
    last_page = lax.div(inputs.kv_lens[seq] - 1, jnp.int32(page_size))

    def part(j: jax.Array, i: int) -> tuple[jax.Array, Any]:
      """Returns the page of part `i` of block `j`, and the rows of the page."""
      if page_size < block_n:
        # After the last page that has tokens there is none. That one is copied
        # again, to be masked, for a barrier waits for all of its copies.
        page = jnp.minimum(j * (block_n // page_size) + i, last_page)
        return inputs.page_indices[seq, page], slice(None)
      per_page = jnp.int32(page_size // block_n)
      return (
        inputs.page_indices[seq, lax.div(j, per_page)],
        pl.ds(lax.rem(j, per_page) * block_n, block_n),
      )

    def key_block(j: jax.Array, num_done: jax.Array) -> jax.Array:
      slot = lax.rem(num_done, jnp.int32(stages))
      for pages, buffer, there, free in rings:

        @pl.when(num_done >= stages)
        def wait(free: Any = free) -> None:
          plgpu.barrier_wait(free.at[slot])

        for i in range(max(block_n // page_size, 1)):
          page, place = part(j, i)
          size = min(page_size, block_n)
          plgpu.copy_gmem_to_smem(
            pages.at[page, kv_head, place],
            buffer.at[slot, pl.ds(i * size, size)],
            there.at[slot],
          )
      return num_done + 1

    return lax.fori_loop(
      inputs.start[item], inputs.stop[item], key_block, num_done
    )

  num_done = _for_work(spec, inputs, tile)
  # Every phase of a barrier must be waited for before the kernel ends.
  for slot in range(stages):

    @pl.when(slot < num_done)
    def drain(slot: int = slot) -> None:
      plgpu.barrier_wait(scratch.k_free.at[slot])
      plgpu.barrier_wait(scratch.v_free.at[slot])


def _compute(
  spec: Spec, inputs: Inputs, scratch: Scratch, thread: jax.Array
) -> None:
  """Computes 64 rows of each tile; `thread` is the warpgroup's number."""
  plgpu.set_max_registers(_COMPUTE_REGISTERS, action='increase')
  rows_ref, q_ref = scratch.rows.at[thread], scratch.q.at[thread]
  shape, block_n = (ROWS, spec.shape.head_dim), spec.sizes.block_n

  def tile(item: jax.Array, head: jax.Array, num_done: jax.Array) -> jax.Array:
    seq, start, stop = inputs.seq[item], inputs.start[item], inputs.stop[item]
    tile_first = first = inputs.first_query[item]
    if spec.sizes.heads > 1:
      head += thread
    else:
      first += ROWS * thread
    q_start, q_stop = inputs.cu_q_lens[seq], inputs.cu_q_lens[seq + 1]
    kv_len = inputs.kv_lens[seq]
    past = kv_len - (q_stop - q_start)
    token = jnp.minimum(q_start + first, inputs.rows.shape[0])
    # Rows after the chunk's are others', or zeros: computed, but not stored.
    plgpu.copy_gmem_to_smem(
      inputs.rows.at[pl.ds(token, ROWS), head],
      rows_ref,
      scratch.q_there.at[thread],
    )
    plgpu.barrier_wait(scratch.q_there.at[thread])
    q_ref[...] = plgpu.load(
      rows_ref, layout=plgpu.Layout.WGMMA, optimized=False
    )
    plgpu.commit_smem()

    # The blocks that all rows see entirely need no mask.
    full_start, full_stop = (
      start,
      jnp.clip(lax.div(past + tile_first + 1, jnp.int32(block_n)), start, stop),
    )
    if (window := spec.options.sliding_window) is not None:
      oldest = jnp.maximum(past + tile_first + spec.sizes.queries - window, 0)
      full_start = jnp.clip(
        lax.div(oldest + (block_n - 1), jnp.int32(block_n)), start, full_stop
      )
    state: Any = (*registers.start(spec.shape.head_dim), num_done)
    step = functools.partial(
      _key_block, spec, scratch, q_ref, past + first, kv_len
    )
    if window is not None:
      state = lax.fori_loop(
        start, full_start, functools.partial(step, True), state
      )
    state = lax.fori_loop(
      full_start, full_stop, functools.partial(step, False), state
    )
    acc, _, norm, num_done = lax.fori_loop(
      full_stop, stop, functools.partial(step, True), state
    )

    _store(
      rows_ref,
      (acc * mosaic_rows.along_rows(1 / norm, shape)).astype(spec.shape.dtype),
    )
    plgpu.commit_smem()
    num_rows = q_stop - q_start - first

    @pl.when(num_rows >= ROWS)
    def store_tile() -> None:
      plgpu.copy_smem_to_gmem(
        rows_ref, inputs.rows.at[pl.ds(token, ROWS), head]
      )

    @pl.when(num_rows < ROWS)
    def store_rows() -> None:
      @pl.loop(0, jnp.maximum(num_rows, 0))
      def store_row(row: jax.Array) -> None:
        plgpu.copy_smem_to_gmem(
          rows_ref.at[pl.ds(row, 1)],
          inputs.rows.at[pl.ds(token + row, 1), head],
        )

    plgpu.wait_smem_to_gmem(0)
    return num_done

  _for_work(spec, inputs, tile)


def _key_block(
  spec: Spec,
  scratch: Scratch,
  q_ref: Any,
  q_first: jax.Array,
  kv_len: jax.Array,
  masked: bool,
  j: jax.Array,
  state: Any,
) -> Any:
  """Takes one block of keys into the online softmax.

  Args:
    spec: of the kernel.
    scratch: the block's shared memory.
    q_ref: [ROWS, h], this warpgroup's queries.
    q_first: the position of the first query in its sequence.
    kv_len: tokens of the sequence.
    masked: whether some row does not see all of the block.
    j: number of the block of keys in the sequence.
    state: (acc [ROWS, h], top [ROWS], norm [ROWS]) float32, and the count of
      key blocks done, int32.

  Returns:
    The new state.
  """
  acc, top, norm, num_done = state
  shape = ROWS, spec.sizes.block_n
  slot = lax.rem(num_done, jnp.int32(spec.sizes.num_stages))

  def multiply(scores_ref: Any) -> jax.Array:
    plgpu.wgmma(scores_ref, q_ref, scratch.k.at[slot].T)
    return scores_ref[...]

  plgpu.barrier_wait(scratch.k_there.at[slot])
  scores = pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))
  plgpu.barrier_arrive(scratch.k_free.at[slot])
  last = None
  if masked:
    last = mosaic_rows.row_numbers() + (q_first - j * spec.sizes.block_n)
  weights, decay, top = registers.weigh(spec.options, scores, top, last)
  norm = norm * decay + weights.sum(axis=1)
  weights = weights.astype(spec.shape.dtype)
  plgpu.barrier_wait(scratch.v_there.at[slot])
  if masked:
    _clear_unwritten(spec, scratch.v.at[slot], kv_len - j * spec.sizes.block_n)
  acc = _accumulate(
    acc * mosaic_rows.along_rows(decay, acc.shape),
    weights,
    scratch.v.at[slot],
    spec.sizes.interpret,
  )
  plgpu.barrier_arrive(scratch.v_free.at[slot])
  return acc, top, norm, num_done + 1


def _clear_unwritten(spec: Spec, v_ref: Any, num_rows: jax.Array) -> None:
  """Zeroes the values after a sequence's last token, for 0 * NaN is NaN.

  Both warpgroups do it, and may do it while the other reads: the rows that
  count keep their bits, and the reader has already zeroed the others.

  Args:
    spec: of the kernel.
    v_ref: [block_n, h], values of one block.
    num_rows: rows of the block that hold tokens; may be more than block_n.
  """
  shape = ROWS, 64  # Larger pieces need more registers than there are.
  for row in range(0, spec.sizes.block_n, ROWS):

    @pl.when(num_rows < row + ROWS)
    def clear(row: int = row) -> None:
      for column in range(0, spec.shape.head_dim, 64):
        piece = v_ref.at[pl.ds(row, ROWS), pl.ds(column, 64)]
        values = plgpu.load(piece, layout=plgpu.Layout.WGMMA)
        at = mosaic_rows.along_rows(mosaic_rows.row_numbers(), shape)
        piece[...] = jnp.where(
          at < num_rows - row, values, jnp.zeros_like(values)
        )
      plgpu.commit_smem()


def _accumulate(
  acc: jax.Array, weights: jax.Array, v_ref: Any, interpret: bool
) -> Any:
  """Returns acc + weights @ values; the weights stay in registers.

  Args:
    acc: [ROWS, h] float32.
    weights: [ROWS, block_n].
    v_ref: [block_n, h].
    interpret: whether the kernel is interpreted.
  """
  if interpret:  # The interpreter knows wgmma of shared memory only.
    return acc + jnp.dot(
      weights, v_ref[...], preferred_element_type=jnp.float32
    )
  run: Any = pl.run_state(lambda acc_ref: plgpu.wgmma(acc_ref, weights, v_ref))
  return run(plgpu.ACC.init(acc))


def _store(ref: Any, value: jax.Array) -> None:
  """Stores [ROWS, h] into rows laid out for TMA, despite bank conflicts."""
  if hasattr(plgpu, 'store'):  # From JAX 0.12 on, it must be called.
    plgpu.store(ref, value, optimized=False)
  else:
    ref[...] = value
