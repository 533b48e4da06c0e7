# SPDX-License-Identifier: Apache-2.0
"""What the engine measures: latencies, steps, waste. No globals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
import dataclasses
import math

from sarathi_jax import types
from sarathi_jax.scheduler import sequence


class Quantiles:
  """Quantiles of positive numbers in bounded memory, within 1 %.

  Counts in buckets of geometric width, as DDSketch (VLDB 2019) does.
  """

  _LOG_GAMMA = math.log(1.02)
  _SMALLEST = 1e-9

  def __init__(self) -> None:
    self._counts: Counter[int] = Counter()
    self.count = 0
    self.total = 0.0
    self.largest = 0.0

  def add(self, values: Iterable[float]) -> None:
    # Sequences of one step share their time between tokens: few are distinct.
    for value, times in Counter(values).items():
      bucket = math.ceil(
        math.log(max(value, self._SMALLEST)) / self._LOG_GAMMA)
      self._counts[bucket] += times
      self.count += times
      self.total += value * times
      self.largest = max(self.largest, value)

  @property
  def mean(self) -> float | None:
    return self.total / self.count if self.count else None

  def quantile(self, q: float) -> float | None:
    """The q-quantile, q in [0, 1]; None without values."""
    if not self.count:
      return None
    rank = q * (self.count - 1)
    seen = 0
    for bucket in sorted(self._counts):
      seen += self._counts[bucket]
      if seen > rank:
        value = math.exp((bucket - 0.5) * self._LOG_GAMMA)
        return min(value, self.largest)
    raise AssertionError('unreachable')


@dataclasses.dataclass(slots=True)
class EngineMetrics:
  """Totals since the engine started. Times are seconds.

  Attributes:
    num_steps: batches launched.
    num_scheduled_tokens: tokens they held.
    num_padded_tokens: rows computed for nothing, to fill compiled shapes.
    wait_s: what the host spent waiting for batches; the rest is its own work.
    num_prompt_tokens, num_output_tokens: of finished requests.
    num_finished: requests that ended by themselves.
    num_aborted: requests that were removed.
    ttft_s, tbt_s, scheduling_delay_s: distributions.
  """

  num_steps: int = 0
  num_scheduled_tokens: int = 0
  num_padded_tokens: int = 0
  wait_s: float = 0.0
  num_prompt_tokens: int = 0
  num_output_tokens: int = 0
  num_finished: int = 0
  num_aborted: int = 0
  ttft_s: Quantiles = dataclasses.field(default_factory=Quantiles)
  tbt_s: Quantiles = dataclasses.field(default_factory=Quantiles)
  scheduling_delay_s: Quantiles = dataclasses.field(default_factory=Quantiles)

  @property
  def padding_waste(self) -> float:
    """The part of all computed rows that was padding."""
    rows = self.num_scheduled_tokens + self.num_padded_tokens
    return self.num_padded_tokens / rows if rows else 0.0

  def record_step(self, num_tokens: int, num_rows: int) -> None:
    self.num_steps += 1
    self.num_scheduled_tokens += num_tokens
    self.num_padded_tokens += num_rows - num_tokens

  def record_finished(self, metrics: types.RequestMetrics) -> None:
    self.num_finished += 1
    self.num_prompt_tokens += metrics.num_prompt_tokens
    self.num_output_tokens += metrics.num_output_tokens
    if metrics.scheduling_delay_s is not None:
      self.scheduling_delay_s.add([metrics.scheduling_delay_s])


@dataclasses.dataclass(slots=True)
class RequestTimes:
  """When a running request's tokens came, seconds on the engine's clock."""

  first_token: float | None = None
  last_token: float | None = None
  max_gap: float = 0.0

  def summary(self, seq: sequence.Sequence, now: float) -> types.RequestMetrics:
    arrival = seq.request.arrival_time
    num_gaps = seq.num_output - 1
    first, last = self.first_token, self.last_token
    tpot_s = None
    if first is not None and last is not None and num_gaps > 0:
      tpot_s = (last - first) / num_gaps
    return types.RequestMetrics(
      num_prompt_tokens=seq.prompt_len,
      num_output_tokens=seq.num_output,
      num_preemptions=seq.num_preemptions,
      scheduling_delay_s=(None if seq.first_scheduled_time is None
                          else seq.first_scheduled_time - arrival),
      ttft_s=None if first is None else first - arrival,
      tpot_s=tpot_s,
      e2e_s=now - arrival,
      max_tbt_s=None if tpot_s is None else self.max_gap)
