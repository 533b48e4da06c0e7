# SPDX-License-Identifier: Apache-2.0
"""The serving loop: schedule, launch, fetch, complete. No JAX, no gRPC."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
import dataclasses
import numbers
import time
from typing import Any, Protocol

from sarathi_jax import errors
from sarathi_jax import scheduler as scheduler_lib
from sarathi_jax import types
from sarathi_jax.engine import detokenizer
from sarathi_jax.engine import metrics as metrics_lib
from sarathi_jax.engine import tokenizer as tokenizer_lib
from sarathi_jax.scheduler import sequence

_STOP = types.FinishReason.STOP
Pending = Any  # What a runner returns for a batch that is being computed.


class Runner(Protocol):
  """Computes batches, in the order of their launch."""

  def launch(self, batch: types.ScheduledBatch) -> Pending:
    """Starts a batch and returns at once."""

  def fetch(self, pending: Pending) -> types.Sampled:
    """Waits for a batch. Called once for each, in the order of launch."""

  def num_rows(self, num_tokens: int) -> int:
    """Rows computed for a batch of `num_tokens`, padding included."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
  """What is being served.

  Attributes:
    model_name: for people.
    family: model family, such as 'llama'.
    vocab_size: token ids are below it.
    max_model_len: most tokens of a sequence, prompt and output.
    eos_token_ids: tokens that end a sequence.
    policy, token_budget, max_num_seqs: of the scheduler.
    num_pages, page_size: of the KV cache.
    default_sampling: values of `SamplingParams` for what a request leaves
      open, where not those of `SamplingParams` itself.
  """

  model_name: str
  family: str
  vocab_size: int
  max_model_len: int
  eos_token_ids: tuple[int, ...]
  policy: str
  token_budget: int
  max_num_seqs: int
  num_pages: int
  page_size: int
  default_sampling: Mapping[str, Any] = dataclasses.field(
    default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
  """The engine's load at one moment."""

  num_running: int
  num_waiting: int
  num_in_flight: int
  num_pages: int
  num_free_pages: int
  num_preemptions: int
  num_steps: int
  padding_waste: float


@dataclasses.dataclass(slots=True)
class _Live:
  """A request between `add` and its end."""

  seq: sequence.Sequence
  detokenizer: detokenizer.Detokenizer | None
  times: metrics_lib.RequestTimes = dataclasses.field(
    default_factory=metrics_lib.RequestTimes)


class Engine:
  """Runs requests to their end, one hybrid batch after another.

  One thread at a time may call it, except `check`, which is pure.

  Args:
    scheduler: decides each step.
    runner: computes it.
    info: what is served.
    tokenizer: None for token ids in and out only.
    clock: seconds, monotonic.
  """

  def __init__(self, scheduler: scheduler_lib.Scheduler, runner: Runner, *,
               info: EngineInfo,
               tokenizer: tokenizer_lib.Tokenizer | None = None,
               clock: Callable[[], float] = time.monotonic) -> None:
    self.info = info
    self.tokenizer = tokenizer
    self.clock = clock
    self.metrics = metrics_lib.EngineMetrics()
    self._scheduler = scheduler
    self._runner = runner
    self._live: dict[str, _Live] = {}
    self._in_flight: deque[tuple[types.ScheduledBatch, Pending]] = deque()
    self._drained: list[types.OutputDelta] = []  # not yet returned by step

  def check(self, request: types.Request) -> None:
    """Raises InvalidRequestError for a request that can never be served."""
    self._scheduler.check(request)
    sampling = request.sampling
    for field, ids in (('prompt_token_ids', request.prompt_token_ids),
                       ('stop_token_ids', sampling.stop_token_ids)):
      for kind in set(map(type, ids)):
        if kind is bool or not issubclass(kind, numbers.Integral):
          bad = next(i for i in ids if type(i) is kind)
          raise errors.InvalidRequestError(
            f'{request.request_id}: {field} has {bad!r}; token ids must be '
            'integers.')
      if ids and not 0 <= min(ids) <= max(ids) < self.info.vocab_size:
        bad = next(i for i in ids if not 0 <= i < self.info.vocab_size)
        raise errors.InvalidRequestError(
          f'{request.request_id}: {field} has the unknown token id {bad}; '
          f'ids must be in [0, {self.info.vocab_size}).')
    if sampling.stop and self.tokenizer is None:
      raise errors.UnsupportedError(
        f'stop={sampling.stop!r}: this model has no tokenizer, so its output '
        'has no text to find stop strings in; use stop_token_ids.')

  def add(self, request: types.Request) -> None:
    """Queues a request; raises InvalidRequestError if it can't be served."""
    self.check(request)
    seq = self._scheduler.add(request)
    detok = (detokenizer.Detokenizer(self.tokenizer, request)
             if self.tokenizer else None)
    self._live[request.request_id] = _Live(seq, detok)

  def abort(self, request_id: str) -> bool:
    """Forgets a request and frees its pages. False if it is unknown."""
    if self._live.pop(request_id, None) is None:
      return False
    self._scheduler.remove(request_id)
    self._drained = [d for d in self._drained if d.request_id != request_id]
    self.metrics.num_aborted += 1
    return True

  @property
  def has_work(self) -> bool:
    return bool(self._live or self._in_flight or self._drained)

  def step(self) -> list[types.OutputDelta]:
    """Launches what can be launched, then completes the oldest batch."""
    while (batch := self._scheduler.schedule(self.clock())).chunks:
      self._in_flight.append((batch, self._runner.launch(batch)))
      self.metrics.record_step(
        batch.num_tokens, self._runner.num_rows(batch.num_tokens))
    outputs, self._drained = self._drained, []
    if self._in_flight:
      outputs += self._complete_oldest()
    return outputs

  def drain(self) -> None:
    """Completes what is in flight; `step` returns its outputs."""
    while self._in_flight:
      self._drained += self._complete_oldest()

  def invalidate_cache(self) -> None:
    """Forgets all KV, after new weights: running requests are recomputed."""
    self.drain()
    self._scheduler.preempt_all()

  def stats(self) -> EngineStats:
    scheduler = self._scheduler
    return EngineStats(
      num_running=len(scheduler.running),
      num_waiting=len(scheduler.waiting),
      num_in_flight=len(self._in_flight),
      num_pages=scheduler.pages.num_pages,
      num_free_pages=scheduler.pages.num_free,
      num_preemptions=scheduler.num_preemptions,
      num_steps=self.metrics.num_steps,
      padding_waste=self.metrics.padding_waste)

  def _complete_oldest(self) -> list[types.OutputDelta]:
    batch, pending = self._in_flight.popleft()
    start = self.clock()
    sampled = self._runner.fetch(pending)
    now = self.clock()
    self.metrics.wait_s += now - start
    events = self._scheduler.complete(batch, sampled)
    lives = [self._live[event[0]] for event in events]
    self._record_times(lives, now)
    return [self._output(event, live, now)
            for event, live in zip(events, lives, strict=True)]

  def _record_times(self, lives: Iterable[_Live], now: float) -> None:
    gaps, first = [], []
    for live in lives:
      times = live.times
      if times.last_token is None:
        times.first_token = now
        first.append(now - live.seq.request.arrival_time)
      else:
        gap = now - times.last_token
        gaps.append(gap)
        if gap > times.max_gap:  # noqa: PLR1730 (this is what most steps do)
          times.max_gap = gap
      times.last_token = now
    self.metrics.tbt_s.add(gaps)
    self.metrics.ttft_s.add(first)

  def _output(self, event: types.TokenEvent, live: _Live,
              now: float) -> types.OutputDelta:
    request_id, token, logprob, reason = event
    text = ''
    stop_reason: int | str | None = None
    if live.detokenizer is not None:
      text, stop_reason = live.detokenizer.step(token, reason is _STOP)
    if reason is None and stop_reason is None:
      return types.OutputDelta(request_id, text, (token,), (logprob,))
    if live.detokenizer is not None and stop_reason is None:
      text += live.detokenizer.flush()
    if stop_reason is not None:
      if reason is None:
        self._scheduler.remove(request_id)
      reason = _STOP
    elif (reason is _STOP
          and token in live.seq.request.sampling.stop_token_ids):
      stop_reason = token
    del self._live[request_id]
    summary = live.times.summary(live.seq, now)
    self.metrics.record_finished(summary)
    return types.OutputDelta(request_id, text, (token,), (logprob,), reason,
                             stop_reason, summary)
