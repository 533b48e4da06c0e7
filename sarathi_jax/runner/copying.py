# SPDX-License-Identifier: Apache-2.0
"""Copies pages of the KV cache: those that are shared, before they are written.

A program beside the steps, run where a batch has copies to make. In a pipeline
a batch's copies are made at each stage just before the stage computes it, as
all that is written: batches before it may yet write to pages that were free
when its copies were planned.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Int
import numpy as np

from sarathi_jax.runner import kv_cache
from sarathi_jax.runner import mesh as mesh_lib

Copies = Sequence[tuple[int, int]]  # pages (from, to), in order

# Copies of a message; each layer's sources are read before any is written.
_NUM = 16
_NOWHERE = np.iinfo(np.int32).max


def size(num_stages: int) -> int:
  """Returns the number of integers of a message."""
  return num_stages * _NUM * 2


def messages(copies: Sequence[Copies]) -> Iterator[np.ndarray]:
  """Yields what makes the copies of each stage, for `copy`, in this order."""
  for start in range(0, max(map(len, copies)), _NUM):
    pages = np.full((len(copies), _NUM, 2), (0, _NOWHERE), np.int32)
    for row, some in zip(pages, copies, strict=True):
      part = some[start : start + _NUM]
      row[: len(part)] = np.reshape(part, (-1, 2))
    yield pages.ravel()


def copy(
  kv: list[kv_cache.LayerKv], ints: Int[Array, ' N'], mesh: Mesh, lies: Any
) -> list[kv_cache.LayerKv]:
  """Copies pages of all layers, each stage its own; `kv` is donated.

  Args:
    kv: the pages, one pair for each layer of a stage.
    ints: a message.
    mesh: that they lie on.
    lies: the sharding of each array of `kv`.
  """
  pages = ints.reshape(mesh.shape[mesh_lib.PP], _NUM, 2)
  if mesh.size == 1:
    return _copy(kv, pages[0])
  shards = mesh_lib.shards_of(mesh)

  def mine(
    kv: list[kv_cache.LayerKv], pages: Int[Array, 'stages N 2']
  ) -> list[kv_cache.LayerKv]:
    stage = 0 if shards.pp is None else lax.axis_index(shards.pp)
    return _copy(kv, pages[stage])

  specs = jax.tree.map(lambda sharding: sharding.spec, lies)
  return jax.shard_map(
    mine,
    mesh=mesh,
    in_specs=(specs, jax.sharding.PartitionSpec()),
    out_specs=specs,
    check_vma=False,
  )(kv, pages)


def _copy(
  kv: list[kv_cache.LayerKv], pages: Int[Array, 'N 2']
) -> list[kv_cache.LayerKv]:
  sources, targets = pages.T
  return jax.tree.map(
    lambda leaf: leaf.at[targets].set(
      leaf.at[sources].get(mode='clip'), mode='drop'
    ),
    kv,
  )
