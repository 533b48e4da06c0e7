# SPDX-License-Identifier: Apache-2.0
"""Two halves of Sarathi-Serve, to show what each is good for (table 4)."""

from __future__ import annotations

from collections.abc import Iterator

from sarathi_jax import config as config_lib
from sarathi_jax.scheduler import base
from sarathi_jax.scheduler import orca
from sarathi_jax.scheduler import sequence


class HybridOnlyScheduler(orca.OrcaScheduler):
  """Hybrid batches without chunks: whole prompts join the decodes.

  Does as Orca, but takes pages for the prompt only.
  """

  reserves_all = False


class ChunkedOnlyScheduler(base.Scheduler):
  """Chunked prefills without hybrid batches: chunks and decodes take turns."""

  in_chunks = True
  _was_prefill = False

  @classmethod
  def max_step_tokens(cls, config: config_lib.SchedulerConfig) -> int:
    return config.token_budget

  def _plan(
    self,
    now: float,
    decodes: list[sequence.Sequence],
  ) -> Iterator[tuple[sequence.Sequence, int]]:
    budget = self.config.token_budget
    if not (self._was_prefill and decodes):
      for seq in self._to_prefill(now):
        if n := min(seq.num_left, budget, self._num_that_fit(seq)):
          budget -= n
          yield seq, n
        if not budget:
          break
    self._was_prefill = budget < self.config.token_budget
    if not self._was_prefill:
      for seq in decodes:
        yield seq, 1

  def _to_prefill(self, now: float) -> Iterator[sequence.Sequence]:
    yield from list(self._prefills())
    while (new := self._admit(now)) is not None:
      yield new
