# SPDX-License-Identifier: Apache-2.0
"""The token budget that follows the time between tokens (TBT).

Each step takes the largest chunk that keeps the tightest running request
inside its target, by the measured times of steps. The budget is a multiple of
128 tokens, decodes counted in: GPUs compute tiles of so many, so that 257
tokens take a third longer than 256 (paper, section 4.3). Where nothing
decodes, nothing bounds it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sarathi_jax import config as config_lib
from sarathi_jax.scheduler import sequence
from sarathi_jax.scheduler import step_time

TILE = 128


class Pace:
  """Chooses each step's budget; owns the model of step times.

  Args:
    config: with tbt_slo_ms.
  """

  def __init__(self, config: config_lib.SchedulerConfig) -> None:
    assert config.tbt_slo_ms is not None
    self.model = step_time.StepTimeModel(config.token_budget)
    # A request's token comes once a batch has passed all stages, so each may
    # take its part of the target.
    self._targets = {
      'interactive': config.tbt_slo_ms / 1e3 / config.num_stages,
      'batch': (None if config.batch_tbt_slo_ms is None
                else config.batch_tbt_slo_ms / 1e3 / config.num_stages)}

  def budget(self, running: Iterable[sequence.Sequence],
             decodes: Sequence[sequence.Sequence],
             prefills: Sequence[tuple[int, int]], most: int) -> int:
    """The most tokens of the next step.

    Args:
      running: all that run; those which decode bound the step, even if they
        are in another batch that it delays.
      decodes: those whose next token is part of the step.
      prefills: (start, tokens left) of the prompts to go on with or to begin,
        in their order.
      most: the configured budget.

    Returns:
      At least len(decodes), at most `most`.
    """
    target = min((t for t in (
      self._targets[s.request.tier] for s in running if not s.is_prefilling)
      if t is not None), default=None)
    num_decodes = len(decodes)
    if target is None or not self.model.num_observed:
      return most
    limit = target / (1 + self.model.spread)
    context = sum(s.num_computed for s in decodes)
    wanted = num_decodes + sum(left for _, left in prefills)
    # The first multiple that leaves room for a chunk, up to what is wanted.
    low = num_decodes // TILE + 1
    high = -(-min(wanted, most) // TILE)

    def fits(tiles: int) -> bool:
      tokens = min(tiles * TILE, most)
      return self.model.predict(
        _load(tokens, num_decodes, context, prefills)) <= limit

    if high < low or not fits(low):
      return num_decodes
    while low < high:  # Longer steps take longer: bisect.
      middle = (low + high + 1) // 2
      if fits(middle):
        low = middle
      else:
        high = middle - 1
    return min(low * TILE, most)


def _load(tokens: int, num_decodes: int, context: int,
          prefills: Sequence[tuple[int, int]]) -> step_time.Load:
  """What a step of so many tokens would be."""
  left = tokens - num_decodes
  pairs = 0
  for start, wanted in prefills:
    n = min(left, wanted)
    pairs += n * (2 * start + n) // 2
    left -= n
    if not left:
      break
  return tokens - left, num_decodes, context, pairs
