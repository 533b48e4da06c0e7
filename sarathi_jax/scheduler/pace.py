# SPDX-License-Identifier: Apache-2.0
"""The token budget that follows two targets: TBT, and TTFT behind it.

Each step takes the most tokens that keep the tightest running request inside
its time between tokens (TBT), by the measured times of steps; of budgets that
do, the one that computes prompts the fastest. Where nothing decodes, nothing
bounds it.

Prompts that wait are never left out: a step takes a chunk of some. If they
would wait longer for their first token (TTFT) than they are to, the budget
grows; where both targets can't be had, it is the one whose worse ratio, of
time to target, is the least. So a queue that grows makes steps longer until
they compute as many tokens a second as the device can, and no longer ones than
it takes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
import itertools
import math
from typing import NamedTuple

from sarathi_jax import config as config_lib
from sarathi_jax.scheduler import sequence
from sarathi_jax.scheduler import step_time

# Of the device's rate of computing prompts, what one may count on while TBT is
# kept; below, TBT gives way.
_LEAST_RATE = 0.25
_SMALLEST = 8  # tokens of a step, of those that are tried
_TRIED = 16  # budgets, evenly up to the largest, beside the powers of two
_NO_TIME = 1e-6  # seconds; a model that is still learning may say less
_HALF_LIFE_S = 10.0  # of what is told of targets that are not kept


class Prompt(NamedTuple):
  """A prompt to go on with, or to begin.

  Attributes:
    start: its tokens in the cache.
    left: its tokens to compute.
    waited_s: for its first token, so far; None: nobody waits for that.
  """

  start: int
  left: int
  waited_s: float | None


class _Plan(NamedTuple):
  """A step that could be next: its tokens, those of prompts, seconds."""

  tokens: int
  chunk: int
  seconds: float


class Pace:
  """Chooses each step's budget; owns the model of step times.

  Args:
    config: with tbt_slo_ms.
    num_rows: see `StepTimeModel`.

  Attributes:
    model: of step times.
    ttft_target: seconds; beside what computing the prompt takes.
  """

  def __init__(self, config: config_lib.SchedulerConfig,
               num_rows: step_time.NumRows = int) -> None:
    assert config.tbt_slo_ms is not None
    self.model = step_time.StepTimeModel(config.token_budget, num_rows)
    self.ttft_target = config.ttft_target_s
    self._share = config.short_prompt_share
    self._num_stages = config.num_stages
    # A request's token comes once a batch has passed all stages, so each may
    # take its part of the target.
    self._targets = {
      'interactive': config.tbt_slo_ms / 1e3 / config.num_stages,
      'batch': (None if config.batch_tbt_slo_ms is None
                else config.batch_tbt_slo_ms / 1e3 / config.num_stages)}
    self._over, self._noted = 0.0, 0.0

  def needed_s(self, now: float) -> float:
    """The TBT that can be held at this load, seconds.

    That of interactive requests' target, or of steps that were planned to take
    longer, if there were any lately.
    """
    target = self._targets['interactive']
    assert target is not None
    return target * (1 + self._over * self._fading(now)) * self._num_stages

  def budget(self, now: float, running: Iterable[sequence.Sequence],
             decodes: Sequence[sequence.Sequence],
             prompts: Sequence[Prompt], most: int) -> int:
    """The most tokens of the next step.

    Args:
      now: seconds on the engine's clock.
      running: all that run; those which decode bound the step, even if they
        are in another batch that it delays.
      decodes: those whose next token is part of the step.
      prompts: in their order.
      most: the configured budget.

    Returns:
      At most `most`; more than len(decodes), but if there are no prompts or
      no room.
    """
    target = min((t for t in (
      self._targets[s.request.tier] for s in running if not s.is_prefilling)
      if t is not None), default=None)
    if target is None or not self.model.num_observed:
      return most
    num_decodes = len(decodes)
    context = sum(s.num_computed for s in decodes)
    spread = 1 + self.model.spread
    if not prompts or num_decodes >= most:
      alone = self.model.predict((num_decodes, num_decodes, context, 0))
      self._note(now, alone * spread / target - 1)
      return num_decodes
    plans = [
      _Plan(tokens, tokens - num_decodes, max(
        _NO_TIME, spread * self.model.predict(
          _load(tokens, num_decodes, context, prompts))))
      for tokens in self._tried(
        num_decodes, sum(p.left for p in prompts), most)]
    best = self._best(plans, target, prompts)
    self._note(now, best.seconds / target - 1)
    return best.tokens

  def _best(self, plans: Sequence[_Plan], target: float,
            prompts: Sequence[Prompt]) -> _Plan:
    """The plan whose worse ratio is the least: of TBT, or the prompts' mean.

    A ratio below 1 is none: of plans that keep both targets, it is the one by
    which all prompts are computed the soonest.
    """
    wanted = sum(p.left for p in prompts)
    kept = max((p.chunk / p.seconds for p in plans if p.seconds <= target),
               default=0.0)
    rate = max(kept, _LEAST_RATE * max(p.chunk / p.seconds for p in plans))
    # The worst of the prompts would be a short one that waited, which the
    # smallest step helps the most, and those behind it the least.
    waits = list(self._waits(prompts, rate))

    def ratio(plan: _Plan) -> float:
      waiting = sum(
        (waited + plan.seconds * math.ceil(ahead / plan.chunk)) / allowed
        for waited, ahead, allowed in waits) / max(1, len(waits))
      return max(1.0, plan.seconds / target, waiting)

    def soonest(plan: _Plan) -> float:
      return plan.seconds * math.ceil(wanted / plan.chunk)

    keeping = [p for p in plans if p.seconds <= target]
    if keeping and ratio(best := min(keeping, key=soonest)) == 1:
      return best
    return min(plans, key=lambda plan: (ratio(plan), soonest(plan)))

  def _waits(self, prompts: Sequence[Prompt],
             rate: float) -> Iterator[tuple[float, float, float]]:
    """Yields, of each that waits: how long, tokens ahead, and its target.

    A prompt has to be computed, too: at `rate`, that is not counted.
    """
    # Up to each length, the tokens of all prompts that are not longer.
    lengths = sorted(p.left for p in prompts)
    up_to = dict(zip(lengths, itertools.accumulate(lengths), strict=True))
    before = 0
    for prompt in prompts:
      before += prompt.left
      if prompt.waited_s is None:
        continue
      ahead: float = before
      if self._share:  # Shorter ones don't wait for longer ones.
        ahead = min(ahead, up_to[prompt.left] / self._share)
      yield (prompt.waited_s, ahead,
             self.ttft_target + (prompt.start + prompt.left) / rate)

  def _tried(self, num_decodes: int, wanted: int, most: int) -> list[int]:
    """Budgets that are worth a look: what steps are padded to, above all."""
    largest = min(num_decodes + wanted, most)
    tried = {largest}
    size = _SMALLEST
    while size < largest:
      tried.add(self.model.num_rows(size))
      size *= 2
    step = -(-most // _TRIED)
    tried.update(range(step, largest, step))
    return sorted(n for n in tried if num_decodes < n <= largest)

  def _note(self, now: float, over: float) -> None:
    """Keeps by how much targets were missed, less and less."""
    self._over = max(over, self._over * self._fading(now), 0.0)
    self._noted = now

  def _fading(self, now: float) -> float:
    return float(0.5 ** (max(0.0, now - self._noted) / _HALF_LIFE_S))


def _load(tokens: int, num_decodes: int, context: int,
          prompts: Sequence[Prompt]) -> step_time.Load:
  """Returns the load of a step of so many tokens."""
  left = tokens - num_decodes
  pairs = 0
  for prompt in prompts:
    n = min(left, prompt.left)
    pairs += n * (2 * prompt.start + n) // 2
    left -= n
    if not left:
      break
  return tokens - left, num_decodes, context, pairs
