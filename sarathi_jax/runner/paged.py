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
from sarathi_jax import page_groups
from sarathi_jax.models import kinds
from sarathi_jax.models import rope
from sarathi_jax.models import sharding
from sarathi_jax.runner import batch as batch_lib
from sarathi_jax.runner import kv_cache
from sarathi_jax.runner import page_tables


def attend_to(
  kv: Sequence[kv_cache.LayerKv],
  b: batch_lib.BatchArrays,
  row: Int[Array, ' T'],
  positions: Int[Array, ' T'],
  *,
  page_size: int,
  queries: tuple[int, int, Any],
  windows: Collection[tuple[int | None, int]],
  tables: page_tables.PageTables | None,
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
    windows: the sliding windows that layers have, each with a group of layers.
    tables: of the groups; None: there is one, whose table is whole.
    shards: of the mesh.
    implementation: of ragged_paged_attention.
    decodes_only: whether the batch has no chunks of prefills.
    batch_invariant: of ragged_paged_attention.
    has_sinks: whether layers have sinks.
  """
  k_pages, _ = kv[0]
  num_slots = jax.tree.leaves(kv)[0].shape[0] * page_size
  is_real = jnp.arange(len(row), dtype=jnp.int32) < b.cu_q_lens[-1]
  tables = tables or page_tables.PageTables(
    page_groups.ONE_GROUP, page_size, b.page_indices.shape[1], len(row)
  )
  # Of all tokens, and of those that are sampled from.
  batches = {True: b, False: _samples_of(b, row)}
  by_group = {
    is_all: tables.split(of.page_indices) for is_all, of in batches.items()
  }
  starts = b.kv_lens - (b.cu_q_lens[1:] - b.cu_q_lens[:-1])
  # Of each sequence, by the window of a group: the tokens before its table.
  before = {
    kept: tables.first_places(kept, starts) * page_size
    for kept in set(tables.windows)
  }

  def kv_lens(is_all: bool, kept: int | None) -> Array:
    """Returns lengths as if each sequence began where its table does."""
    lens: Array = batches[is_all].kv_lens
    if kept is None:
      return lens
    rows = row[b.sample_tokens]
    return jnp.maximum(lens - before[kept][... if is_all else rows], 0)

  def slot_mapping(group: int) -> Array:
    at = positions
    if (kept := tables.windows[group]) is not None:
      at -= before[kept][row]
    pages = by_group[True][group][row, at // page_size]
    return jnp.where(is_real, pages * page_size + at % page_size, num_slots)

  slot_mappings = [slot_mapping(group) for group in range(len(tables.windows))]
  *heads, dtype = queries

  def plan(is_all: bool, window: int | None, kept: int | None) -> Any:
    num = len(row if is_all else b.sample_tokens)
    of = batches[is_all]
    return rpa.make_plan(
      jax.ShapeDtypeStruct((num, *heads), rpa.query_dtype(k_pages, dtype)),
      k_pages,
      kv_lens(is_all, kept),
      of.cu_q_lens,
      of.distribution,
      sliding_window=window,
      decodes_only=decodes_only or not is_all,
      batch_invariant=batch_invariant,
      has_sinks=has_sinks,
      implementation=implementation,
    )

  plans = {
    (is_all, *kind): plan(is_all, *kind)
    for is_all, kind in itertools.product(
      batches, {(window, tables.windows[group]) for window, group in windows}
    )
  }

  def table(is_all: bool, groups: Sequence[int]) -> Array:
    """Returns this stage's table, of a group at each."""
    width = max(by_group[is_all][group].shape[1] for group in groups)

    def of(group: int) -> Array:
      array = by_group[is_all][group]
      return jnp.pad(array, ((0, 0), (0, width - array.shape[1])))

    page_indices: Array = shards.by_stage(groups, of)
    return page_indices

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
    is_all = rows is None
    of, page_indices = batches[is_all], table(is_all, groups)

    def within(kind: tuple[kinds.AttentionOptions, int | None]) -> Array:
      options, kept = kind
      return rpa.ragged_paged_attention(
        q_kv,
        *pages,
        kv_lens(is_all, kept),
        page_indices,
        of.cu_q_lens,
        of.distribution,
        scale=options.scale,
        sinks=sinks,
        sliding_window=options.window,
        soft_cap=options.soft_cap,
        plan=plans[is_all, options.window, kept],
        batch_invariant=batch_invariant,
        implementation=implementation,
      )

    here = [
      (kind, tables.windows[group])
      for kind, group in zip(options, groups, strict=True)
    ]
    return shards.by_stage(here, within).astype(q.dtype), pages

  return attend


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
