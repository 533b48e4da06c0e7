# SPDX-License-Identifier: Apache-2.0
"""A sequence between its arrival and its end, and when its tokens came."""

from __future__ import annotations

import dataclasses

from sarathi_jax import types
from sarathi_jax.scheduler import sequence
from sarathi_jax.text import detokenizer


@dataclasses.dataclass(slots=True)
class RequestTimes:
  """Times of a running request's tokens, seconds on the engine's clock."""

  first_token: float | None = None
  last_token: float | None = None
  max_gap: float = 0.0

  def summary(
    self, seq: sequence.Sequence, num_output: int, now: float
  ) -> types.RequestMetrics:
    """Returns the metrics of a request that ends now.

    Args:
      seq: its progress.
      num_output: tokens of its output.
      now: seconds on the engine's clock.
    """
    arrival = seq.request.arrival_time
    num_gaps = num_output - 1
    first, last = self.first_token, self.last_token
    tpot_s = None
    if first is not None and last is not None and num_gaps > 0:
      tpot_s = (last - first) / num_gaps
    return types.RequestMetrics(
      num_prompt_tokens=seq.prompt_len,
      num_cached_tokens=seq.num_cached,
      num_output_tokens=num_output,
      num_preemptions=seq.num_preemptions,
      scheduling_delay_s=(
        None
        if seq.first_scheduled_time is None
        else seq.first_scheduled_time - arrival
      ),
      ttft_s=None if first is None else first - arrival,
      tpot_s=tpot_s,
      e2e_s=now - arrival,
      max_tbt_s=None if tpot_s is None else self.max_gap,
    )


@dataclasses.dataclass(slots=True)
class Live:
  """A sequence between `Engine.add` and its end.

  Attributes:
    seq: its progress, the scheduler's.
    detokenizer: makes text of its tokens; None without a tokenizer.
    has_grammar: whether its output is held to one.
    times: of its tokens.
  """

  seq: sequence.Sequence
  detokenizer: detokenizer.Detokenizer | None
  has_grammar: bool
  times: RequestTimes = dataclasses.field(default_factory=RequestTimes)
