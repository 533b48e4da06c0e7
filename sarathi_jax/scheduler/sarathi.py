# SPDX-License-Identifier: Apache-2.0
"""Sarathi-Serve: chunked prefills, stall-free (paper, section 4, Alg. 3)."""

from __future__ import annotations

from collections.abc import Iterator
import itertools

from sarathi_jax import config as config_lib
from sarathi_jax.scheduler import base
from sarathi_jax.scheduler import sequence


class SarathiScheduler(base.Scheduler):
  """Decodes first, then prefills begun, then new ones, in one token budget."""

  @classmethod
  def max_step_tokens(cls, config: config_lib.SchedulerConfig) -> int:
    return config.token_budget

  def _plan(
      self, now: float, decodes: list[sequence.Sequence],
  ) -> Iterator[tuple[sequence.Sequence, int]]:
    budget = self.config.token_budget - len(decodes)
    # Of the step, not of what is left: else each prompt would leave a part of
    # a part, down to chunks of a single token.
    share = int(budget * self.config.short_prompt_share)
    for seq in decodes:
      yield seq, 1
    prefills = list(self._prefills())
    for i, seq in enumerate(prefills):
      if n := self._chunk_len(seq, budget, share, now, prefills[i + 1:]):
        budget -= n
        yield seq, n
    while budget and (new := self._admit(now)):
      if n := self._chunk_len(new, budget, share, now, []):
        budget -= n
        yield new, n

  def _chunk_len(self, seq: sequence.Sequence, budget: int, share: int,
                 now: float, behind: list[sequence.Sequence]) -> int:
    """How much of what is left of the budget the prefill `seq` takes.

    All it can use, but for a share that shorter prompts behind it can: or a
    long prompt would hold them up for many steps.
    """
    n = min(seq.num_left, budget, self._num_that_fit(seq))
    if budget > share and n > budget - share:
      n = min(n, budget - self._wanted_behind(seq, share, now, behind))
    return n

  def _wanted_behind(self, seq: sequence.Sequence, at_most: int, now: float,
                     behind: list[sequence.Sequence]) -> int:
    """Tokens that prompts behind `seq`, and shorter, could use now."""
    if not at_most:
      return 0
    lens = [s.num_left for s in behind]
    if self._next_to_admit(now):
      lens += [len(s.tokens) for s in itertools.islice(self.waiting, 8)
               if s.request.arrival_time <= now]
    return min(at_most, sum(n for n in lens if n < seq.num_left))
