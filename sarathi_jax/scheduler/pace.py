# SPDX-License-Identifier: Apache-2.0
"""Chooses token budgets that follow two targets: TBT, then TTFT.

The first target is the time between tokens (TBT) of the tightest running
request. Of the budgets that keep it, by the measured times of steps, a step
takes the one that computes prompts the fastest. Where nothing decodes, nothing
bounds the budget.

Waiting prompts are never left out: a step takes a chunk of some. If they would
wait for their first token (TTFT) longer than its target, the budget grows.
Where both targets can't be met, it is the budget whose worse ratio, of time to
target, is the least. So a growing queue makes steps longer, until they compute
as many tokens a second as the device can, but not longer than that needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
import itertools
import math
from typing import NamedTuple

from sarathi_jax import config as config_lib
from sarathi_jax.scheduler import sequence
from sarathi_jax.scheduler import step_time

# The fraction of the device's rate of computing prompts to count on while TBT
# is kept; below it, TBT gives way.
_LEAST_RATE = 0.25
_SMALLEST = 8  # tokens of the smallest step that is tried
_TRIED = 16  # budgets, evenly up to the largest, beside the powers of two
_NO_TIME = 1e-6  # seconds; a model that is still learning may predict less
_HALF_LIFE_S = 10.0  # of the memory of targets that were missed


class Prompt(NamedTuple):
  """A prompt to go on with, or to begin.

  Attributes:
    start: its tokens in the cache.
    left: its tokens still to compute.
    waited_s: seconds waited for its first token; None: nobody waits for it.
  """

  start: int
  left: int
  waited_s: float | None


class _Plan(NamedTuple):
  """A step that could be next.

  Attributes:
    tokens: all of its tokens.
    chunk: its tokens of prompts.
    seconds: its predicted time.
  """

  tokens: int
  chunk: int
  seconds: float


class Pace:
  """Chooses each step's budget; owns the model of step times.

  Args:
    config: has tbt_slo_ms.
    num_rows: see `StepTimeModel`.

  Attributes:
    model: the model of step times.
    ttft_target: seconds, beyond the time that computing the prompt takes.
  """

  def __init__(
    self, config: config_lib.SchedulerConfig, num_rows: step_time.NumRows = int
  ) -> None:
    assert config.tbt_slo_ms is not None
    self.model = step_time.StepTimeModel(config.token_budget, num_rows)
    self.ttft_target = config.ttft_target_s
    self._share = config.short_prompt_share
    self._num_stages = config.num_stages
    # A request's token comes once a batch has passed all stages, so each may
    # take its part of the target.
    self._targets = {
      'interactive': config.tbt_slo_ms / 1e3 / config.num_stages,
      'batch': (
        None
        if config.batch_tbt_slo_ms is None
        else config.batch_tbt_slo_ms / 1e3 / config.num_stages
      ),
    }
    self._over, self._noted = 0.0, 0.0

  def needed_s(self, now: float) -> float:
    """Returns the TBT that can be kept at this load, seconds.

    It is the target of interactive requests, or longer if steps were lately
    planned to take longer.
    """
    target = self._targets['interactive']
    assert target is not None
    return target * (1 + self._over * self._fading(now)) * self._num_stages

  def budget(
    self,
    now: float,
    running: Iterable[sequence.Sequence],
    decodes: Sequence[sequence.Sequence],
    prompts: Sequence[Prompt],
    most: int,
  ) -> int:
    """Returns the most tokens of the next step.

    Args:
      now: seconds on the engine's clock.
      running: all running sequences; those that decode bound the step, even if
        they are in another batch, which it delays.
      decodes: the sequences whose next token is part of the step.
      prompts: the prompts, in the order in which they will be computed.
      most: the configured budget.

    Returns:
      At most `most`; more than len(decodes), but if there are no prompts or
      no room.
    """
    target = min(
      (
        t
        for t in (
          self._targets[s.request.tier] for s in running if not s.is_prefilling
        )
        if t is not None
      ),
      default=None,
    )
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
      _Plan(
        tokens,
        tokens - num_decodes,
        max(
          _NO_TIME,
          spread
          * self.model.predict(_load(tokens, num_decodes, context, prompts)),
        ),
      )
      for tokens in self._tried(num_decodes, sum(p.left for p in prompts), most)
    ]
    best = self._best(plans, target, prompts)
    self._note(now, best.seconds / target - 1)
    return best.tokens

  def _best(
    self, plans: Sequence[_Plan], target: float, prompts: Sequence[Prompt]
  ) -> _Plan:
    """Returns the plan whose worse ratio, of time to target, is the least.

    One ratio is TBT's, the other the mean of the prompts'. Ratios below 1 count
    as 1: of the plans that keep both targets, the best is the one that computes
    all prompts the soonest.
    """
    wanted = sum(p.left for p in prompts)
    kept = max(
      (p.chunk / p.seconds for p in plans if p.seconds <= target), default=0.0
    )
    rate = max(kept, _LEAST_RATE * max(p.chunk / p.seconds for p in plans))
    # The mean, not the worst: the worst prompt would be a short one that has
    # waited. The smallest step helps that the most, and those behind the least.
    waits = list(self._waits(prompts, rate))

    def ratio(plan: _Plan) -> float:
      waiting = sum(
        (waited + plan.seconds * math.ceil(ahead / plan.chunk)) / allowed
        for waited, ahead, allowed in waits
      ) / max(1, len(waits))
      return max(1.0, plan.seconds / target, waiting)

    def soonest(plan: _Plan) -> float:
      return plan.seconds * math.ceil(wanted / plan.chunk)

    keeping = [p for p in plans if p.seconds <= target]
    if keeping and ratio(best := min(keeping, key=soonest)) == 1:
      return best
    return min(plans, key=lambda plan: (ratio(plan), soonest(plan)))

  def _waits(
    self, prompts: Sequence[Prompt], rate: float
  ) -> Iterator[tuple[float, float, float]]:
    """Yields for each waiting prompt: seconds waited, tokens ahead, target.

    The target includes the time to compute the prompt itself, at `rate`.
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
      if self._share:  # Short prompts don't wait for longer ones.
        ahead = min(ahead, up_to[prompt.left] / self._share)
      yield (
        prompt.waited_s,
        ahead,
        self.ttft_target + (prompt.start + prompt.left) / rate,
      )

  def _tried(self, num_decodes: int, wanted: int, most: int) -> list[int]:
    """Returns budgets that are worth trying, such as the padded sizes."""
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
    """Remembers by how much targets were missed, with fading memory."""
    self._over = max(over, self._over * self._fading(now), 0.0)
    self._noted = now

  def _fading(self, now: float) -> float:
    return float(0.5 ** (max(0.0, now - self._noted) / _HALF_LIFE_S))


def _load(
  tokens: int, num_decodes: int, context: int, prompts: Sequence[Prompt]
) -> step_time.Load:
  """Returns the load of a step of so many tokens, `num_decodes` of decodes."""
  left = tokens - num_decodes
  pairs = 0
  for prompt in prompts:
    n = min(left, prompt.left)
    pairs += n * (2 * prompt.start + n) // 2
    left -= n
    if not left:
      break
  return tokens - left, num_decodes, context, pairs
