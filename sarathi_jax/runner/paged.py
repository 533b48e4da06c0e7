# SPDX-License-Identifier: Apache-2.0
"""Makes a step's attention, over the pages of its sequences."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import ragged_paged_attention as rpa
from pallas_kernels import rotate_and_write
from sarathi_jax.models import kinds
from sarathi_jax.models import rope
from sarathi_jax.models import sharding
from sarathi_jax.runner import batch as batch_lib
from sarathi_jax.runner import kv_cache


def attend_to(
  kv: Sequence[kv_cache.LayerKv],
  b: batch_lib.BatchArrays,
  row: Int[Array, ' T'],
  positions: Int[Array, ' T'],
  *,
  page_size: int,
  queries: tuple[int, int, Any],
  windows: Collection[int | None],
  num_groups: int,
  shards: sharding.Shards,
  implementation: str | None,
  decodes_only: bool = False,
  batch_invariant: bool = False,
  has_sinks: bool = False,
) -> Callable[..., tuple[Array, kv_cache.LayerKv]]:
  """Makes what rotates, writes keys and values to pages, and attends.

  It is called as a `models.Attend`, with queries and keys as projected, their
  norms and their `rotation`. Its `options` and `groups` are one a stage: those
  of the layer there. Queries are of all tokens, or, with `rows`, of those that
  are sampled from. Unless it `writes`, the keys and values are there already.
  Layers share plans.

  Args:
    kv: the pages, one pair for each layer of a group.
    b: the batch.
    row: each token's row in the batch.
    positions: each token's position in its sequence.
    page_size: tokens in a page.
    queries: (heads, head dim, dtype) of the queries.
    windows: the sliding windows that layers have.
    num_groups: of layers, each with a page table.
    shards: of the mesh.
    implementation: of ragged_paged_attention.
    decodes_only: whether the batch has no chunks of prefills.
    batch_invariant: of ragged_paged_attention.
    has_sinks: whether layers have sinks.
  """
  k_pages, _ = kv[0]
  num_slots = jax.tree.leaves(kv)[0].shape[0] * page_size
  is_real = jnp.arange(len(row), dtype=jnp.int32) < b.cu_q_lens[-1]
  # Of the groups, by whether of all tokens.
  tables = {True: _by_group(b.page_indices, num_groups)}
  slot_mappings = [
    jnp.where(
      is_real,
      table[row, positions // page_size] * page_size + positions % page_size,
      num_slots,
    )
    for table in tables[True]
  ]
  batches = {True: b, False: _samples_of(b, row)}
  tables[False] = _by_group(batches[False].page_indices, num_groups)
  *heads, dtype = queries

  def plan(is_all: bool, window: int | None) -> Any:
    num = len(row if is_all else b.sample_tokens)
    of = batches[is_all]
    return rpa.make_plan(
      jax.ShapeDtypeStruct((num, *heads), rpa.query_dtype(k_pages, dtype)),
      k_pages,
      of.kv_lens,
      of.cu_q_lens,
      of.distribution,
      sliding_window=window,
      decodes_only=decodes_only or not is_all,
      batch_invariant=batch_invariant,
      has_sinks=has_sinks,
      implementation=implementation,
    )

  plans = {
    (is_all, window): plan(is_all, window)
    for is_all, window in itertools.product(batches, windows)
  }

  def attend(
    layer_kv: kv_cache.LayerKv,
    q: Float[Array, 'rows H h'],
    k: Float[Array, 'T K h'],
    v: Float[Array, 'T K h'],
    *,
    norms: rotate_and_write.HeadNorms | None,
    sinks: Float[Array, ' H'] | None,
    rotation: rope.Rotation,
    options: Sequence[kinds.AttentionOptions],
    groups: Sequence[int],
    rows: Array | None,
    writes: bool,
  ) -> tuple[Array, kv_cache.LayerKv]:
    pages = layer_kv
    if writes:
      turned, pages = rotate_and_write.rotate_and_write(
        q,
        k,
        v,
        rotation,
        *layer_kv,
        shards.by_stage(groups, slot_mappings.__getitem__),
        norms=norms,
        rows=rows,
      )
    else:
      assert rows is None
      turned = rotate_and_write.turn(q, rotation, norms and norms[0])
    # The cache may have a dtype of its own, see `kv_cache.choose_dtype`.
    q_kv = turned.astype(rpa.query_dtype(layer_kv[0], q.dtype))
    of = batches[rows is None]
    page_indices = shards.by_stage(groups, tables[rows is None].__getitem__)

    def within(options: kinds.AttentionOptions) -> Array:
      return rpa.ragged_paged_attention(
        q_kv,
        *pages,
        of.kv_lens,
        page_indices,
        of.cu_q_lens,
        of.distribution,
        scale=options.scale,
        sinks=sinks,
        sliding_window=options.window,
        soft_cap=options.soft_cap,
        plan=plans[rows is None, options.window],
        batch_invariant=batch_invariant,
        implementation=implementation,
      )

    return shards.by_stage(options, within).astype(q.dtype), pages

  return attend


def _by_group(
  page_indices: Int[Array, 'S places'], num_groups: int
) -> list[Int[Array, 'S P']]:
  """Returns the page table of each group of layers."""
  if num_groups == 1:
    return [page_indices]
  places = page_indices.reshape(len(page_indices), -1, num_groups)
  return [places[:, :, group] for group in range(num_groups)]


def _samples_of(
  b: batch_lib.BatchArrays,
  row: Int[Array, ' T'],
) -> batch_lib.BatchArrays:
  """Returns the batch of the tokens that are sampled from, as decodes."""
  index = jnp.arange(b.sample_tokens.shape[0] + 1, dtype=jnp.int32)
  return b._replace(
    cu_q_lens=jnp.minimum(index, b.num_samples),
    kv_lens=b.sample_positions,
    page_indices=b.page_indices[row[b.sample_tokens]],
    distribution=jnp.tile(b.num_samples, 2),
  )
