# SPDX-License-Identifier: Apache-2.0
"""The interface to what computes a scheduler's batches: devices, or a fake."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from sarathi_jax import types

# A runner's own handle of a batch that it computes: of `launch`, for `fetch`.
Pending = Any


class Runner(Protocol):
  """Computes batches, in the order of their launch."""

  def launch(self, batch: types.ScheduledBatch) -> Pending:
    """Starts a batch and returns at once."""

  def mask(self, pending: Pending, masks: Mapping[int, Any]) -> None:
    """Says which tokens may come, before they count.

    Called at most once for a batch, if it samples for sequences that follow a
    grammar; after the batches that these were in before were fetched, and
    before another batch is launched.

    Args:
      pending: the batch.
      masks: index in the batch's `samplers` -> [ceil(V / 32)] int32, token i is
        bit i % 32 of word i // 32. Of others, what is sampled is void.
    """

  def fetch(self, pending: Pending) -> types.Sampled:
    """Waits for a batch; called once for each, in the order of launch."""

  def num_rows(self, num_tokens: int) -> int:
    """Returns the rows computed for `num_tokens`, padding included."""

  def recover(self) -> None:
    """Gets ready for new batches after one failed; may lose the cache.

    Raises:
      Exception: the device can't be used any more.
    """
