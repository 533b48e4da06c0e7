# SPDX-License-Identifier: Apache-2.0
"""Orca: iteration-level batching of whole prompts (paper, section 2.5)."""

from __future__ import annotations

from collections.abc import Iterator

from sarathi_jax import config as config_lib
from sarathi_jax.scheduler import base
from sarathi_jax.scheduler import sequence


class OrcaScheduler(base.Scheduler):
  """Lets whole prompts join the running decodes.

  Reserves memory for the longest possible sequence, so that nothing is ever
  preempted.
  """

  reserves_all = True

  @classmethod
  def max_step_tokens(cls, config: config_lib.SchedulerConfig) -> int:
    return max(config.token_budget, config.max_model_len) + config.max_num_seqs

  def _plan(
    self,
    now: float,
    decodes: list[sequence.Sequence],
  ) -> Iterator[tuple[sequence.Sequence, int]]:
    budget = self.max_step_tokens(self.config) - len(decodes)
    for seq in decodes:
      yield seq, 1
    yield from self._admit_whole(
      now, budget, self.config.max_model_len if self.reserves_all else 0
    )
