# SPDX-License-Identifier: Apache-2.0
"""What computes the batches that a scheduler plans: a device's, or a fake."""

from __future__ import annotations

from typing import Any, Protocol

from sarathi_jax import types

Pending = Any  # What a runner returns for a batch that is being computed.


class Runner(Protocol):
  """Computes batches, in the order of their launch."""

  def launch(self, batch: types.ScheduledBatch) -> Pending:
    """Starts a batch and returns at once."""

  def fetch(self, pending: Pending) -> types.Sampled:
    """Waits for a batch. Called once for each, in the order of launch."""

  def num_rows(self, num_tokens: int) -> int:
    """Rows computed for a batch of `num_tokens`, padding included."""

  def recover(self) -> None:
    """Makes ready for new batches after one failed; the cache may be lost.

    Raises:
      Exception: the device is of no use any more.
    """
