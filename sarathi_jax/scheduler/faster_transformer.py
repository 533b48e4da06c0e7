# SPDX-License-Identifier: Apache-2.0
"""FasterTransformer: request-level batching (paper, section 2.5)."""

from __future__ import annotations

from collections.abc import Iterator

from sarathi_jax.scheduler import base
from sarathi_jax.scheduler import sequence


class FasterTransformerScheduler(base.Scheduler):
  """Runs a batch of requests to its end before it forms the next one."""

  waits_for_prefixes = False  # It would be for all of a batch.

  def _plan(
    self,
    now: float,
    decodes: list[sequence.Sequence],
  ) -> Iterator[tuple[sequence.Sequence, int]]:
    if self.running:
      for seq in decodes:
        yield seq, 1
    else:
      yield from self._admit_whole(
        now,
        self.max_step_tokens(self.config),
        reserve=self.config.max_model_len,
      )
