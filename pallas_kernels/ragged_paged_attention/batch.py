# SPDX-License-Identifier: Apache-2.0
"""The arguments of every implementation, beside queries and pages."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax


class Batch(NamedTuple):
  """The ragged batch, int32; see `api.ragged_paged_attention`.

  Attributes:
    kv_lens: [S], tokens in the cache, the new ones included.
    page_indices: [S, P], pages of each sequence, in order.
    cu_q_lens: [S + 1], where each sequence's tokens start, and the end.
    distribution: [2], (num_decodes, num_seqs).
  """

  kv_lens: jax.Array
  page_indices: jax.Array
  cu_q_lens: jax.Array
  distribution: jax.Array


@dataclasses.dataclass(frozen=True, slots=True)
class Options:
  """Options that are compiled in; see `api.ragged_paged_attention`."""

  scale: float
  sliding_window: int | None = None
  soft_cap: float | None = None
  batch_invariant: bool = False
