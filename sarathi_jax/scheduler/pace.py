# SPDX-License-Identifier: Apache-2.0
"""Chooses token budgets that follow two targets: TBT, then TTFT.

The first target is the time between tokens (TBT) of the tightest running
request. Of the budgets that keep it, by the measured times of steps, a step
takes the one that computes prompts the soonest. Where nothing decodes, nothing
bounds the budget.

Waiting prompts are never left out: a step takes a chunk of some. The second
target is the median time to a first token (TTFT). A queue that comes and goes
does not miss it, so it makes nobody stutter. Only where most first tokens are
late, or prompts wait many times the target, can't both be met. Then it is the
budget whose worse ratio, of time to target, is the least. So a queue that stays
makes steps longer, until they compute as many tokens a second as the device
can, but not longer than that needs.

In a pipeline, all stages wait for the longest of the steps under way. Where all
slots are taken, so that others wait for decodes to end, what a chunk makes its
step longer by counts for every decode: prompts are spread over several steps.
"""

from __future__ import annotations

from collections import deque
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
_PARTS = 4  # budgets that are tried between two powers of two
_NO_TIME = 1e-6  # seconds; a model that is still learning may predict less
_HALF_LIFE_S = 10.0  # of the memory of targets that were missed
_REMEMBERED = 512  # first tokens whose median is held to the target
# Times the target that prompts wait, on average, while most were in time.
_PATIENCE = 10.0


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
    stalls: seconds by which other stages delay decodes for it, summed.
  """

  tokens: int
  chunk: int
  seconds: float
  stalls: float


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
    self._rate = math.inf  # of computing prompts, tokens a second
    # Of the last first tokens, whether they were late.
    self._were_late: deque[bool] = deque(maxlen=_REMEMBERED)

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
    *,
    is_full: bool = False,
  ) -> int:
    """Returns the most tokens of the next step.

    Args:
      now: seconds on the engine's clock.
      running: all running sequences; those that decode bound the step, even if
        they are in another batch, which it delays.
      decodes: the sequences whose next token is part of the step.
      prompts: the prompts, in the order in which they will be computed.
      most: the configured budget.
      is_full: whether these and the running sequences take all slots.

    Returns:
      At most `most`; more than len(decodes), but if there are no prompts or
      no room.
    """
    tiers = [s.request.tier for s in running if not s.is_prefilling]
    target = min(
      (t for t in map(self._targets.get, tiers) if t is not None), default=None
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
    alone, num_stalled = 0.0, is_full * len(tiers) * (self._num_stages - 1)
    if num_stalled:
      alone = self.model.predict((num_decodes, num_decodes, context, 0))
    plans = []
    for tokens in self._tried(num_decodes, sum(p.left for p in prompts), most):
      mean = self.model.predict(_load(tokens, num_decodes, context, prompts))
      plans.append(
        _Plan(
          tokens,
          tokens - num_decodes,
          max(_NO_TIME, spread * mean),
          num_stalled * max(0.0, mean - alone),
        )
      )
    best = self._best(plans, target, prompts)
    self._note(now, best.seconds / target - 1)
    return best.tokens

  def answer(self, prompt: Prompt) -> None:
    """Notes that the next step ends a prompt, which brings its first token."""
    if prompt.waited_s is not None:
      self._were_late.append(
        prompt.waited_s > self._allowed(prompt, self._rate)
      )

  def _best(
    self, plans: Sequence[_Plan], target: float, prompts: Sequence[Prompt]
  ) -> _Plan:
    """Returns the plan that computes all prompts the soonest, within target.

    Where the prompts' own target is lost, it is the plan whose worse ratio, of
    time to target, is the least. One ratio is TBT's, the other the mean of the
    prompts'. Ratios below 1 count as 1.
    """
    wanted = sum(p.left for p in prompts)
    kept = max(
      (p.chunk / p.seconds for p in plans if p.seconds <= target), default=0.0
    )
    self._rate = max(
      kept, _LEAST_RATE * max(p.chunk / p.seconds for p in plans)
    )
    waits = list(self._waits(prompts, self._rate))

    def seconds(plan: _Plan, tokens: float) -> float:
      """Returns the time after which so many tokens are through all stages."""
      num_steps = math.ceil(tokens / plan.chunk) + self._num_stages - 1
      return num_steps * plan.seconds

    def ratios(plan: _Plan) -> list[float]:
      return [
        (waited + seconds(plan, ahead)) / allowed
        for waited, ahead, allowed in waits
      ]

    def worse(plan: _Plan) -> float:
      # The mean, not the worst: the worst prompt would be a short one that has
      # waited. The smallest step helps that the most, and those behind the
      # least.
      return max(1.0, plan.seconds / target, _mean(ratios(plan)))

    def delay(plan: _Plan) -> float:
      return len(prompts) * seconds(plan, wanted) + plan.stalls

    keeping = [p for p in plans if p.seconds <= target]
    if keeping and not self._is_lost(ratios(best := min(keeping, key=delay))):
      return best
    return min(plans, key=lambda plan: (worse(plan), delay(plan)))

  def _is_lost(self, ratios: Sequence[float]) -> bool:
    """Says whether the target of prompts is lost if these wait so long.

    Args:
      ratios: of their time to target.
    """
    num_late = sum(self._were_late) + sum(r > 1 for r in ratios)
    return (
      2 * num_late > len(self._were_late) + len(ratios)
      or _mean(ratios) > _PATIENCE
    )

  def _allowed(self, prompt: Prompt, rate: float) -> float:
    """Returns the target, and the time to compute the prompt at `rate`."""
    return self.ttft_target + (prompt.start + prompt.left) / rate

  def _waits(
    self, prompts: Sequence[Prompt], rate: float
  ) -> Iterator[tuple[float, float, float]]:
    """Yields for each waiting prompt: seconds waited, tokens ahead, target."""
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
      yield prompt.waited_s, ahead, self._allowed(prompt, rate)

  def _tried(self, num_decodes: int, wanted: int, most: int) -> list[int]:
    """Returns budgets that are worth trying, such as the padded sizes."""
    largest = min(num_decodes + wanted, most)
    tried = {largest}
    size = _SMALLEST
    while size < largest:
      tried.update(
        self.model.num_rows(size * part // _PARTS)
        for part in range(_PARTS, 2 * _PARTS)
      )
      size *= 2
    return sorted(n for n in tried if num_decodes < n <= largest)

  def _note(self, now: float, over: float) -> None:
    """Remembers by how much targets were missed, with fading memory."""
    self._over = max(over, self._over * self._fading(now), 0.0)
    self._noted = now

  def _fading(self, now: float) -> float:
    return float(0.5 ** (max(0.0, now - self._noted) / _HALF_LIFE_S))


def _mean(values: Sequence[float]) -> float:
  return sum(values) / max(1, len(values))


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
