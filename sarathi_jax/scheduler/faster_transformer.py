# SPDX-License-Identifier: Apache-2.0
"""FasterTransformer: request-level batching (paper, section 2.5)."""

from __future__ import annotations

from collections.abc import Iterator

from sarathi_jax.scheduler import base
from sarathi_jax.scheduler import sequence


class FasterTransformerScheduler(base.Scheduler):
  """A batch of requests runs to its end before the next one is formed."""

  def _plan(
      self, now: float, decodes: list[sequence.Sequence],
  ) -> Iterator[tuple[sequence.Sequence, int]]:
    if self.running:
      for seq in decodes:
        yield seq, 1
      return
    budget = self.max_step_tokens(self.config)
    while (head := self._next_to_admit(now)) and len(head.tokens) <= budget:
      new = self._admit(now, reserve=self.config.max_model_len)
      if new is None:
        break
      budget -= new.num_left
      yield new, new.num_left
