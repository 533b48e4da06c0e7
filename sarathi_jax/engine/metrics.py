# SPDX-License-Identifier: Apache-2.0
"""The engine's measurements: latencies, steps, waste. No globals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
import dataclasses
import math

from sarathi_jax import types
from sarathi_jax.engine import live as live_lib


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
      bucket = math.ceil(math.log(max(value, self._SMALLEST)) / self._LOG_GAMMA)
      self._counts[bucket] += times
      self.count += times
      self.total += value * times
      self.largest = max(self.largest, value)

  def copy(self) -> Quantiles:
    copy = Quantiles()
    copy._counts = self._counts.copy()
    copy.count, copy.total, copy.largest = (
      self.count,
      self.total,
      self.largest,
    )
    return copy

  def since(self, earlier: Quantiles) -> Quantiles:
    """Returns the quantiles of the values added after `earlier` was copied.

    `largest` is still the largest of all.
    """
    new = self.copy()
    new._counts.subtract(earlier._counts)
    new.count -= earlier.count
    new.total -= earlier.total
    return new

  def cumulative(self, bounds: Sequence[float]) -> list[int]:
    """Counts the values that are at most each bound, bounds ascending.

    A value up to 2 % beyond a bound may count; one at a bound does.
    """
    counts, seen = [], 0
    buckets = iter(sorted(self._counts.items()))
    bucket = next(buckets, None)
    for bound in bounds:
      last = math.ceil(math.log(bound) / self._LOG_GAMMA)
      while bucket is not None and bucket[0] <= last:
        seen += bucket[1]
        bucket = next(buckets, None)
      counts.append(seen)
    return counts

  @property
  def mean(self) -> float | None:
    return self.total / self.count if self.count else None

  def quantile(self, q: float) -> float | None:
    """Returns the q-quantile, q in [0, 1]; None without values."""
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
    num_padded_tokens: rows of padding computed, to fill compiled shapes.
    wait_s: time that the host waited for batches; the rest is its own work.
    busy_s: time that steps took, from one completion to the next while any
      was under way.
    num_prompt_tokens, num_output_tokens: of finished requests; of several
      outputs of a request, the first one's end counts the prompt.
    num_begun_tokens: of prompts whose first token was sampled, each once.
    num_begun_cached: those of them that were found in the KV cache.
    num_generated: tokens sampled so far, of all requests.
    num_finished: outputs that ended by themselves; a request has `sampling.n`.
    finish_reasons: the same, by reason.
    num_aborted: outputs that were given up.
    num_step_faults: steps that failed.
    decode_stall_s: the time that decodes spent waiting, while steps ran that
      they were not in, summed over decodes. Stall-free scheduling has none.
    imbalance: by how much the longest of the micro-batches in flight exceeds
      their mean, in rows, as a fraction of the mean; summed over steps.
    ttft_s, tbt_s, scheduling_delay_s, tpot_s, e2e_s, prefill_s, decode_s:
      distributions; prefill_s is from the first schedule to the first token,
      decode_s from there to the end.
    prompt_len, output_len: distributions of finished requests' tokens.
    step_tokens: distribution of tokens a step.
    budget_use: distribution of the fraction of the token budget that a step
      used.
  """

  num_steps: int = 0
  num_scheduled_tokens: int = 0
  num_padded_tokens: int = 0
  wait_s: float = 0.0
  busy_s: float = 0.0
  num_prompt_tokens: int = 0
  num_output_tokens: int = 0
  num_begun_tokens: int = 0
  num_begun_cached: int = 0
  num_generated: int = 0
  num_finished: int = 0
  finish_reasons: Counter[types.FinishReason] = dataclasses.field(
    default_factory=Counter
  )
  num_aborted: int = 0
  num_step_faults: int = 0
  decode_stall_s: float = 0.0
  imbalance: float = 0.0
  ttft_s: Quantiles = dataclasses.field(default_factory=Quantiles)
  tbt_s: Quantiles = dataclasses.field(default_factory=Quantiles)
  scheduling_delay_s: Quantiles = dataclasses.field(default_factory=Quantiles)
  tpot_s: Quantiles = dataclasses.field(default_factory=Quantiles)
  e2e_s: Quantiles = dataclasses.field(default_factory=Quantiles)
  prefill_s: Quantiles = dataclasses.field(default_factory=Quantiles)
  decode_s: Quantiles = dataclasses.field(default_factory=Quantiles)
  prompt_len: Quantiles = dataclasses.field(default_factory=Quantiles)
  output_len: Quantiles = dataclasses.field(default_factory=Quantiles)
  step_tokens: Quantiles = dataclasses.field(default_factory=Quantiles)
  budget_use: Quantiles = dataclasses.field(default_factory=Quantiles)

  def copy(self) -> EngineMetrics:
    """Returns a copy of the present values, for other threads."""
    return dataclasses.replace(
      self,
      finish_reasons=self.finish_reasons.copy(),
      **{
        field.name: getattr(self, field.name).copy()
        for field in dataclasses.fields(self)
        if isinstance(getattr(self, field.name), Quantiles)
      },
    )

  @property
  def padding_waste(self) -> float:
    """The fraction of all computed rows that was padding."""
    rows = self.num_scheduled_tokens + self.num_padded_tokens
    return self.num_padded_tokens / rows if rows else 0.0

  def record_step(
    self,
    num_tokens: int,
    num_rows: int,
    token_budget: int,
    imbalance: float = 0.0,
  ) -> None:
    """Counts a step; `imbalance` is its term of the sum of that name."""
    self.num_steps += 1
    self.imbalance += imbalance
    self.step_tokens.add([num_tokens])
    self.budget_use.add([num_tokens / token_budget])
    self.num_scheduled_tokens += num_tokens
    self.num_padded_tokens += num_rows - num_tokens

  def record_tokens(
    self, lives: Iterable[live_lib.Live], now: float, cycle_s: float | None
  ) -> None:
    """Records that sequences gain tokens now.

    Args:
      lives: the sequences.
      now: seconds on the engine's clock.
      cycle_s: see `StepTimes`.
    """
    gaps, first = [], []
    for live in lives:
      times = live.times
      if times.last_token is None:
        times.first_token = now
        first.append(now - live.seq.request.arrival_time)
        if not live.seq.index:
          self.num_begun_tokens += live.seq.prompt_len
          self.num_begun_cached += live.seq.num_cached
      else:
        gap = now - times.last_token
        gaps.append(gap)
        if gap > times.max_gap:  # noqa: PLR1730 (this is what most steps do)
          times.max_gap = gap
      times.last_token = now
    self.tbt_s.add(gaps)
    self.ttft_s.add(first)
    if cycle_s is not None:
      self.decode_stall_s += sum(gap - cycle_s for gap in gaps if gap > cycle_s)

  def record_finished(
    self, metrics: types.RequestMetrics, reason: types.FinishReason, index: int
  ) -> None:
    """Counts an output that ended; `index` says which of its request's."""
    self.num_finished += 1
    self.finish_reasons[reason] += 1
    if not index:
      self.num_prompt_tokens += metrics.num_prompt_tokens
      self.prompt_len.add([metrics.num_prompt_tokens])
    self.num_output_tokens += metrics.num_output_tokens
    self.output_len.add([metrics.num_output_tokens])
    self.e2e_s.add([metrics.e2e_s])
    if metrics.tpot_s is not None:
      self.tpot_s.add([metrics.tpot_s])
    delay_s, ttft_s = metrics.scheduling_delay_s, metrics.ttft_s
    if delay_s is not None:
      self.scheduling_delay_s.add([delay_s])
    if delay_s is not None and ttft_s is not None:
      self.prefill_s.add([ttft_s - delay_s])
      self.decode_s.add([metrics.e2e_s - ttft_s])
