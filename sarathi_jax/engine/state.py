# SPDX-License-Identifier: Apache-2.0
"""An engine's own report: its load, and how far requests are."""

from __future__ import annotations

import collections
import dataclasses
from typing import NamedTuple, Protocol

from sarathi_jax import scheduler as scheduler_lib
from sarathi_jax import types
from sarathi_jax.engine import adapters as adapters_lib
from sarathi_jax.engine import metrics as metrics_lib
from sarathi_jax.scheduler import sequence


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
  """The engine's load at one moment.

  `num_running`, `num_waiting`, `num_finished` and `num_aborted` count outputs,
  of which a request may have several.

  `num_prefilled` counts each token of a prompt once, however often it was
  computed. `num_looked_up` counts tokens of requests that were looked for in
  the KV cache as they were admitted, `num_found` those of them that were there,
  and `num_found_again` those that were there after a preemption.
  """

  num_running: int
  num_waiting: int
  num_in_flight: int
  num_pages: int
  num_free_pages: int
  num_preemptions: int
  num_steps: int
  padding_waste: float
  num_prefilled: int
  num_looked_up: int
  num_found: int
  num_found_again: int
  num_generated: int
  num_finished: int
  num_aborted: int
  token_budget: int
  last_step_tokens: int
  decode_stall_s: float
  ttft_p50_s: float | None
  ttft_p99_s: float | None
  tbt_p50_s: float | None
  tbt_p99_s: float | None


class Load(NamedTuple):
  """What routers go by; see `EngineStats`. Quick to make, after each step."""

  num_running: int
  num_waiting: int
  num_free_pages: int
  num_generated: int
  num_looked_up: int
  num_found: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RequestState:
  """The progress of one output of a request.

  Attributes:
    request_id: of the request.
    index: which of the request's outputs it is.
    client: who sent it.
    is_running: whether it has a place in the batch; otherwise it waits.
    num_prompt_tokens: tokens of its prompt.
    num_computed: tokens in the cache.
    num_output_tokens: tokens generated so far.
    max_output_tokens: tokens of output at which it ends.
    num_preemptions: how often its pages were taken back.
    age_s: seconds since it arrived.
  """

  request_id: str
  index: int
  client: str
  is_running: bool
  num_prompt_tokens: int
  num_computed: int
  num_output_tokens: int
  max_output_tokens: int
  num_preemptions: int
  age_s: float


class AdapterState(NamedTuple):
  """How much an adapter is used.

  Attributes:
    name, generation: see `types.Adapter`.
    num_running: outputs that run with it.
    num_waiting: outputs that wait, in the engine.
  """

  name: str
  generation: int
  num_running: int
  num_waiting: int


class Observer(Protocol):
  """Is told what an engine does, on the engine's thread: it must be quick.

  Times are seconds on the engine's clock.
  """

  def on_step(
    self,
    batch: types.ScheduledBatch,
    num_rows: int,
    launched: float,
    started: float,
    completed: float,
  ) -> None:
    """Is told that a batch is done, which had the device from `started` on."""

  def on_finished(
    self,
    seq: sequence.Sequence,
    metrics: types.RequestMetrics,
    reason: types.FinishReason,
    now: float,
  ) -> None:
    """Is told that an output ended by itself, and was not aborted."""


def load(
  scheduler: scheduler_lib.Scheduler, metrics: metrics_lib.EngineMetrics
) -> Load:
  """Returns the load of an engine with this scheduler and these metrics."""
  return Load(
    num_running=sum(1 + len(seq.forks) for seq in scheduler.running),
    num_waiting=sum(1 + len(seq.forks) for seq in scheduler.waiting),
    num_free_pages=scheduler.pages.num_free,
    num_generated=metrics.num_generated,
    num_looked_up=scheduler.prefixes.num_looked_up,
    num_found=scheduler.prefixes.num_found,
  )


def engine_stats(
  scheduler: scheduler_lib.Scheduler,
  metrics: metrics_lib.EngineMetrics,
  *,
  num_in_flight: int,
  last_step_tokens: int,
) -> EngineStats:
  """Returns all that is known of an engine with these."""
  return EngineStats(
    **load(scheduler, metrics)._asdict(),
    num_in_flight=num_in_flight,
    num_pages=scheduler.pages.num_pages,
    num_preemptions=scheduler.num_preemptions,
    num_steps=metrics.num_steps,
    padding_waste=metrics.padding_waste,
    num_prefilled=scheduler.num_prefilled,
    num_found_again=scheduler.prefixes.num_found_again,
    num_finished=metrics.num_finished,
    num_aborted=metrics.num_aborted,
    token_budget=scheduler.config.token_budget,
    last_step_tokens=last_step_tokens,
    decode_stall_s=metrics.decode_stall_s,
    ttft_p50_s=metrics.ttft_s.quantile(0.5),
    ttft_p99_s=metrics.ttft_s.quantile(0.99),
    tbt_p50_s=metrics.tbt_s.quantile(0.5),
    tbt_p99_s=metrics.tbt_s.quantile(0.99),
  )


def room(scheduler: scheduler_lib.Scheduler, priority: int) -> tuple[int, int]:
  """Returns (sequences, tokens) that a step could begin; see `Engine.room`."""
  waiting = [s for s in scheduler.waiting if s.request.priority <= priority]
  able = scheduler.slots.able
  ahead = waiting if able is None else list(able(waiting))

  def num_of(seqs: list[sequence.Sequence]) -> int:
    return sum(1 + len(seq.forks) for seq in seqs)

  # Who waits for an adapter's slot leaves room for others, up to a number.
  num_held = num_of(waiting) - num_of(ahead)
  return (
    scheduler.slots.num_free()
    - num_of(ahead)
    - max(0, num_held - scheduler.config.max_num_seqs),
    scheduler.config.token_budget
    - sum(map(scheduler.prefixes.num_missing, ahead)),
  )


def adapter_states(
  scheduler: scheduler_lib.Scheduler, adapters: adapters_lib.Adapters
) -> list[AdapterState]:
  """Returns how much each adapter is used, in the order of their loading.

  What was unloaded is left out, though requests may have it yet.
  """
  running, waiting = (
    collections.Counter(
      adapter
      for seq in seqs
      for adapter in [seq.request.adapter] * (1 + len(seq.forks))
    )
    for seqs in (scheduler.running, scheduler.waiting)
  )
  return [
    AdapterState(a.name, a.generation, running[a], waiting[a])
    for a in adapters.loaded
  ]


def request_state(seq: sequence.Sequence, now: float) -> RequestState:
  """Returns how far a request is, at `now` of the engine's clock."""
  return RequestState(
    request_id=seq.request.request_id,
    index=seq.index,
    client=seq.request.client,
    is_running=seq.slot >= 0,
    num_prompt_tokens=seq.prompt_len,
    num_computed=seq.num_computed,
    num_output_tokens=seq.num_output,
    max_output_tokens=seq.max_len - seq.prompt_len,
    num_preemptions=seq.num_preemptions,
    age_s=now - seq.request.arrival_time,
  )
