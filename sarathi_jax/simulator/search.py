# SPDX-License-Identifier: Apache-2.0
"""Capacity: the largest rate at which a service holds its objectives.

The paper's definition (section 5): the most queries a second with a P99 time
between tokens within the SLO, and a median scheduling delay within 2 seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import math

from sarathi_jax import config as config_lib
from sarathi_jax.engine import metrics as metrics_lib

# A rate that nothing we simulate comes near, or falls below.
_LEAST, _MOST = 1e-3, 1e4


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
  """The service-level objectives that must hold.

  Attributes:
    p99_tbt_s: the most that the 99th percentile of times between tokens is.
    p50_delay_s: the most that the median scheduling delay is.
  """

  p99_tbt_s: float
  p50_delay_s: float = 2.0

  def __post_init__(self) -> None:
    for field in ('p99_tbt_s', 'p50_delay_s'):
      value = getattr(self, field)
      config_lib.check(
        math.isfinite(value) and value > 0,
        f'slo.{field}',
        value,
        'must be seconds > 0',
      )

  def is_lost(self, tbt_s: metrics_lib.Quantiles, num_gaps: int) -> bool:
    """Says whether too many gaps were too long, even if no other will be.

    Args:
      tbt_s: the gaps seen so far.
      num_gaps: how many there will be in all.
    """
    of_seen = 1 - 0.01 * num_gaps / max(tbt_s.count, 1)
    return of_seen > 0 and (
      (tbt_s.quantile(of_seen) or 0) > self.p99_tbt_s * 1.01
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Point:
  """What was seen at one rate. Times are seconds.

  Attributes:
    qps: requests a second.
    p99_tbt_s, p50_ttft_s, p50_scheduling_delay_s: see their names; of a probe
      that ended early, of what it saw.
    holds: whether the SLO was met.
    found: the part of the prompts' tokens that was in the cache; None where
      nobody tells.
  """

  qps: float
  p99_tbt_s: float
  p50_ttft_s: float
  p50_scheduling_delay_s: float
  holds: bool
  found: float | None = None


# Sees what happens at each of several rates, at once if it can.
Probe = Callable[[Sequence[float]], Sequence[Point]]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
  """The result of a search.

  Attributes:
    best: the point at the largest rate that held; None if none did.
    points: all points that were tried, by rate.
  """

  best: Point | None
  points: tuple[Point, ...]

  @property
  def qps(self) -> float:
    return self.best.qps if self.best else 0.0


def find(
  probe: Probe, start: float, *, width: int = 1, precision: float = 0.02
) -> Capacity:
  """Searches for the capacity.

  Args:
    probe: tries a rate; see `Probe`.
    start: the rate to begin with.
    width: rates to try at once: 1 bisects, more divide finer.
    precision: relative; a rate this much above the result does not hold.
  """
  config_lib.check(start > 0, 'start_qps', start, 'must be > 0')
  points: list[Point] = []

  def try_rates(rates: Sequence[float]) -> None:
    points.extend(probe(rates))

  def held() -> float:
    failed = lowest_failed()
    return max(
      (p.qps for p in points if p.holds and p.qps < failed), default=0.0
    )

  def lowest_failed() -> float:
    return min((p.qps for p in points if not p.holds), default=math.inf)

  # Outwards, until one rate holds and one does not; then inwards.
  try_rates([start * 2 ** (i - width // 2) for i in range(width)])
  while lowest_failed() == math.inf and held() < _MOST:
    try_rates([held() * 2 ** (i + 1) for i in range(width)])
  while held() == 0 and lowest_failed() > _LEAST:
    try_rates([lowest_failed() / 2 ** (i + 1) for i in range(width)])
  while held() and lowest_failed() / held() > 1 + precision:
    low, ratio = held(), lowest_failed() / held()
    if ratio == math.inf:
      break
    try_rates([low * ratio ** ((i + 1) / (width + 1)) for i in range(width)])
  best = max(
    (p for p in points if p.holds and p.qps <= held()),
    key=lambda p: p.qps,
    default=None,
  )
  return Capacity(best=best, points=tuple(sorted(points, key=lambda p: p.qps)))
