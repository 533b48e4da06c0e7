# SPDX-License-Identifier: Apache-2.0
"""The progress of one request."""

from __future__ import annotations

import dataclasses

from sarathi_jax import types


@dataclasses.dataclass(eq=False, slots=True)
class Sequence:
  """A request's tokens and place in the KV cache. The scheduler alone writes.

  Prefill, chunk, decode and recompute are all "compute the next n tokens":
  tokens [0, num_computed) are in the cache, or will be once the batches in
  flight ran; then come the rest of `tokens`, and `num_pending` more that were
  sampled by batches in flight and are known to the device only.

  Attributes:
    request: what was asked.
    urgency: the priority, and of how many requests before: the smallest is
      the most urgent.
    seed: of its random numbers.
    stop_ids: tokens that end it.
    prompt_len: tokens of the prompt.
    max_len: its length, prompt and output, at which it ends.
    tokens: prompt and output, as far as known here.
    num_computed: see above.
    num_pending: see above.
    prefill_len: tokens to compute before the next one is sampled, set when
      it is admitted: the prompt, or after a preemption the output too.
    slot: its row on the device while it runs, else -1.
    pages: of the cache, in order.
    page_table: the same, as the tuple that chunks share.
    num_in_flight: batches in flight that hold it.
    last_step: the last batch that held it.
    num_preemptions: how often its pages were taken back.
    first_scheduled_time: seconds on the engine's clock; None before.
    is_finished: it ended or was removed; results still in flight are void.
  """

  request: types.Request
  urgency: tuple[int, int]
  seed: int
  stop_ids: frozenset[int]
  prompt_len: int
  max_len: int
  tokens: list[int]
  num_computed: int = 0
  num_pending: int = 0
  prefill_len: int = 0
  slot: int = -1
  pages: list[int] = dataclasses.field(default_factory=list)
  page_table: tuple[int, ...] = ()
  num_in_flight: int = 0
  last_step: int = -1
  num_preemptions: int = 0
  first_scheduled_time: float | None = None
  is_finished: bool = False

  @property
  def num_output(self) -> int:
    return len(self.tokens) - self.prompt_len

  @property
  def is_prefilling(self) -> bool:
    return self.num_computed < self.prefill_len

  @property
  def num_left(self) -> int:
    """Tokens of the prefill that are still to be computed."""
    return self.prefill_len - self.num_computed
