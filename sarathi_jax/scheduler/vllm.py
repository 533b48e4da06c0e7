# SPDX-License-Identifier: Apache-2.0
"""vLLM before chunked prefills: prefills first (paper, section 2.5)."""

from __future__ import annotations

from collections.abc import Iterator

from sarathi_jax.scheduler import base
from sarathi_jax.scheduler import sequence


class VllmScheduler(base.Scheduler):
  """Runs new prompts first, whole; decodes run in batches without prefills.

  A prompt longer than the token budget gets a batch of its own.
  """

  def _plan(
    self,
    now: float,
    decodes: list[sequence.Sequence],
  ) -> Iterator[tuple[sequence.Sequence, int]]:
    budget = self.config.token_budget
    any_prefill = False
    while head := self._next_to_admit(now):
      if any_prefill and self.prefixes.num_missing(head) > budget:
        break
      seq = self._admit(now, reserve=len(head.tokens))
      if seq is None:
        break
      budget -= seq.num_left
      any_prefill = True
      yield seq, seq.num_left
    if not any_prefill:
      for seq in decodes:
        yield seq, 1
