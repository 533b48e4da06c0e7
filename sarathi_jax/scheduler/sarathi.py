# SPDX-License-Identifier: Apache-2.0
"""Sarathi-Serve: chunked prefills, stall-free (paper, section 4, Alg. 3).

With pipeline stages, batches under way at once should take the same time, or
stages wait for one another (section 3.3). So each batch takes its share of the
decodes, and chunks shrink as the context before them grows.
"""

from __future__ import annotations

from collections.abc import Iterator
import itertools
import math

from sarathi_jax import config as config_lib
from sarathi_jax.scheduler import base
from sarathi_jax.scheduler import pace
from sarathi_jax.scheduler import sequence


class SarathiScheduler(base.Scheduler):
  """Decodes first, then prefills begun, then new ones, in one token budget."""

  in_chunks = True

  @classmethod
  def max_step_tokens(cls, config: config_lib.SchedulerConfig) -> int:
    return config.token_budget

  def _plan(
    self,
    now: float,
    decodes: list[sequence.Sequence],
  ) -> Iterator[tuple[sequence.Sequence, int]]:
    decodes = self._fair_share(decodes)
    budget = self._budget(now, decodes) - len(decodes)
    # A part of the step's budget, not of what is left of it: otherwise each
    # prompt would leave a part of a part, down to chunks of a single token.
    share = int(budget * self.config.short_prompt_share)
    for seq in decodes:
      yield seq, 1
    prefills = list(self._prefills())
    for i, seq in enumerate(prefills):
      if n := self._chunk_len(seq, budget, share, now, prefills[i + 1 :]):
        budget = max(0, budget - self._cost(seq, n))
        self._note_first_token(seq, n, now)
        yield seq, n
    while budget and (new := self._admit(now)):
      if n := self._chunk_len(new, budget, share, now, []):
        budget = max(0, budget - self._cost(new, n))
        self._note_first_token(new, n, now)
        yield new, n

  def _budget(self, now: float, decodes: list[sequence.Sequence]) -> int:
    if self.pace is None:
      return self.config.token_budget
    prompts = [_prompt(s, s.num_left, now) for s in self._prefills()]
    # What finds no slot can't be computed, however long the step.
    num_free = self.slots.num_free()
    coming = list(itertools.islice(self.waiting, min(8, num_free)))
    if self._next_to_admit(now):
      prompts += [
        _prompt(s, self.prefixes.guess_missing(s), now) for s in coming
      ]
    return self.pace.budget(
      now,
      self.running,
      decodes,
      prompts,
      self.config.token_budget,
      is_full=num_free <= len(coming),
    )

  def _note_first_token(
    self, seq: sequence.Sequence, n: int, now: float
  ) -> None:
    """Tells the pace where the next n tokens are a prefill's last."""
    if self.pace is not None and n == seq.num_left:
      self.pace.answer(_prompt(seq, n, now))

  def _fair_share(
    self,
    decodes: list[sequence.Sequence],
  ) -> list[sequence.Sequence]:
    """Returns a stage's part of all decodes, those that waited longest first.

    Otherwise decodes that became ready together would stay together: one batch
    would have all of them, and the next ones none. A decode that is left out
    goes first in the next batch. Each batch holds its share, so none waits for
    a whole round.
    """
    if self.config.num_stages == 1:
      return decodes
    total = sum(not seq.is_prefilling for seq in self.running)
    share = -(-total // self.config.num_stages)
    return sorted(decodes, key=lambda seq: seq.last_step)[:share]

  def _cost(self, seq: sequence.Sequence, n: int) -> int:
    """Returns what the next n tokens of a prefill take of the budget."""
    return math.ceil(n * self._token_cost(seq))

  def _token_cost(self, seq: sequence.Sequence) -> float:
    if self.pace is not None:  # The pace counts what chunks attend to.
      return 1.0
    return 1 + self.config.prefix_cost * seq.num_computed

  def _chunk_len(
    self,
    seq: sequence.Sequence,
    budget: int,
    share: int,
    now: float,
    behind: list[sequence.Sequence],
  ) -> int:
    """Returns the tokens that the prefill `seq` takes of the budget left.

    It takes all it can use, except a share that shorter prompts behind it can
    use: otherwise a long prompt would hold them up for many steps.
    """
    n = min(
      seq.num_left,
      self._num_that_fit(seq),
      max(1, int(budget / self._token_cost(seq))) if budget else 0,
    )
    if budget > share and n > budget - share:
      n = min(n, budget - self._wanted_behind(seq, share, now, behind))
    return n

  def _wanted_behind(
    self,
    seq: sequence.Sequence,
    at_most: int,
    now: float,
    behind: list[sequence.Sequence],
  ) -> int:
    """Returns tokens that shorter prompts behind `seq` could use now."""
    if not at_most:
      return 0
    lens = [s.num_left for s in behind]
    if self._next_to_admit(now):
      lens += [
        self.prefixes.guess_missing(s)
        for s in itertools.islice(self.waiting, 8)
        if s.request.arrival_time <= now
      ]
    return min(at_most, sum(n for n in lens if n < seq.num_left))


def _prompt(seq: sequence.Sequence, left: int, now: float) -> pace.Prompt:
  """Returns what a prefill has yet to compute, and how long it has waited."""
  request = seq.request
  waits = request.tier == 'interactive' and not seq.num_output
  return pace.Prompt(
    len(seq.tokens) - left,
    left,
    max(0.0, now - request.arrival_time) if waits else None,
  )
