# SPDX-License-Identifier: Apache-2.0
"""The base of every policy: queues, pages, preemption and completion.

A policy is one generator, `_plan`. Whatever it plans, the base class ensures
that

- each ready decode has a page for its next token, or the step waits until
  enough batches in flight have completed;
- the least urgent sequences give up their pages first, and are recomputed
  later;
- what is in flight is never preempted;
- the most urgent requests are admitted first, but for a few that may pass
  others of the same client where `cache_aware_window` says so.
"""

from __future__ import annotations

import abc
from collections import deque
from collections.abc import Iterable, Iterator
import dataclasses
import itertools
import math
import random

from sarathi_jax import config as config_lib
from sarathi_jax import types
from sarathi_jax.scheduler import checks
from sarathi_jax.scheduler import forks as forks_lib
from sarathi_jax.scheduler import pace
from sarathi_jax.scheduler import queues
from sarathi_jax.scheduler import sequence
from sarathi_jax.scheduler import step_time
from sarathi_jax.scheduler import urgency

Sequence = sequence.Sequence
_ERROR = types.FinishReason.ERROR


class Scheduler(queues.Queues, abc.ABC):
  """Makes batches of those who run, and takes in what came of them.

  One thread at a time may call it, except `check`, which is pure.

  Args:
    config: the scheduler's limits.
    num_rows: returns the rows that a batch of so many tokens is padded to; the
      runner's.
  """

  def __init__(
    self, config: config_lib.SchedulerConfig, num_rows: step_time.NumRows = int
  ) -> None:
    if not self.in_chunks:
      config.check_room(config.max_model_len)
    super().__init__(config)
    # The pace that the budget follows, if any; it learns from `pacing`.
    self.pace = (
      None if config.tbt_slo_ms is None else pace.Pace(config, num_rows)
    )
    self.num_prefilled = 0  # tokens of prompts computed, each counted once
    self._in_flight: deque[tuple[types.ScheduledBatch, list[Sequence]]] = (
      deque()
    )
    self._orders = itertools.count()
    self._random = random.Random(config.seed)

  # -- What a policy defines --

  # Whether a prompt may be computed in chunks as small as there is room for.
  in_chunks = False

  @classmethod
  def max_step_tokens(cls, config: config_lib.SchedulerConfig) -> int:
    """Returns the most tokens that a step of this policy holds."""
    return max(config.token_budget, config.max_model_len)

  @abc.abstractmethod
  def _plan(
    self, now: float, decodes: list[Sequence]
  ) -> Iterator[tuple[Sequence, int]]:
    """Yields (sequence, number of its tokens to compute) for the next batch.

    Args:
      now: seconds on the engine's clock.
      decodes: every running sequence whose next token can be computed; each
        has the page for it.
    """

  # -- What the engine calls --

  def check(self, request: types.Request) -> None:
    """Raises InvalidRequestError for a request that can never be served."""
    checks.check(request, self.config)

  def add(
    self,
    request: types.Request,
    bad_words: tuple[tuple[int, ...], ...] = (),
  ) -> list[Sequence]:
    """Queues a request that `check` accepted.

    Args:
      request: the request.
      bad_words: the token ids of each of its bad words.

    Returns:
      Its sequences, `sampling.n` of them; for reading only.
    """
    num_tokens = len(request.prompt_token_ids)
    assert 0 < num_tokens < self.config.max_model_len, num_tokens
    seed = request.sampling.seed
    if seed is None:
      seed = self._random.getrandbits(31)
    first = Sequence.of(
      request, self.config, next(self._orders), seed, bad_words
    )
    first.forks = [
      Sequence.of(
        request,
        self.config,
        next(self._orders),
        seed,
        bad_words,
        first,
        index,
      )
      for index in range(1, request.sampling.n)
    ]
    urgency.insert(self.waiting, first)
    return [first, *first.forks]

  def remove(self, seq: Sequence) -> bool:
    """Ends a sequence now and frees its pages; returns False if it has ended.

    Results of batches in flight are void for it. Its pages may be reused at
    once, as the device runs batches in order. Forks that have not begun end
    with the sequence that they wait for.
    """
    if seq.is_finished:
      return False
    if seq.slot < 0:
      self.waiting.remove(seq)
      queues.end(seq)
    else:
      # Of what was recomputed after a preemption this would not be known.
      is_known = seq.num_output and not seq.num_preemptions
      self._finish(seq, len(seq.tokens) - 1 if is_known else 0)
    return True

  def set_token_budget(self, token_budget: int) -> None:
    """Changes the most tokens of a step, from the next one on.

    Raises:
      ConfigError: it is less than max_num_seqs.
    """
    self.config = dataclasses.replace(self.config, token_budget=token_budget)

  def forget_in_flight(self) -> None:
    """Gives up the batches in flight; their sequences will be recomputed."""
    for batch, seqs in self._in_flight:
      for seq, chunk in zip(seqs, batch.samplers, strict=True):
        seq.num_in_flight -= 1
        seq.num_pending -= chunk.samples
    self._in_flight.clear()
    self.preempt_all()
    self.slots.adapters.forget()

  def preempt_all(self) -> None:
    """Takes back all pages, whose contents are void.

    Every running sequence will be recomputed.
    """
    assert not self._in_flight
    for seq in reversed(list(self.running)):
      self._preempt(seq)
    self.pages.unregister_all()

  def new_weights(self, *, keeps: bool) -> None:
    """Takes back all pages; or lets nobody else find what is in them."""
    if not keeps:
      return self.preempt_all()
    return self.prefixes.forget(self.running)

  @property
  def is_idle(self) -> bool:
    return not (self.waiting or self.running)

  @property
  def num_in_flight(self) -> int:
    return len(self._in_flight)

  def schedule(self, now: float) -> types.ScheduledBatch:
    """Plans the next step.

    Returns:
      A batch to launch. It has no chunks if there is nothing to do, or nothing
      can be done before a batch in flight completes.
    """
    self._preempted, self._copies = [], []
    chunks: list[types.Chunk] = []
    seqs: list[Sequence] = []
    num_tokens = 0
    if len(self._in_flight) < self.config.max_in_flight:
      decodes = self._secure_decodes()
      while decodes is not None:
        for seq, n in self._plan(now, decodes):
          chunks.append(self._take(seq, n))
          seqs.append(seq)
          num_tokens += n
        if chunks or self._in_flight or len(self.running) < 2:
          break
        # Prefills alone hold all pages, and none has enough to go on.
        self._preempt(self.running[-1])
    batch = types.ScheduledBatch(
      self._step,
      tuple(chunks),
      num_tokens,
      tuple(self._preempted),
      self._begin_forks(chunks, seqs),
      tuple(self._copies),
      self.slots.adapters.take_loads(),
    )
    assert chunks or not (batch.copies or batch.loads)
    if chunks:
      self._in_flight.append((batch, seqs))
      self._step += 1
    return batch

  def complete(
    self, batch: types.ScheduledBatch, sampled: types.Sampled
  ) -> list[types.TokenEvent]:
    """Takes in the tokens of the oldest batch in flight.

    Returns:
      What each request gained; errors come last.
    """
    oldest, seqs = self._in_flight.popleft()
    assert oldest is batch, 'batches complete in the order of their launch'
    events: list[types.TokenEvent] = []
    failed: list[types.TokenEvent] = []
    is_any_nan = math.isnan(
      sum(itertools.chain.from_iterable(sampled.logprobs))
    )
    if sampled.prompts is not None:
      failed += self._keep_told(seqs, batch, sampled.prompts)
    for seq, chunk, tokens, logprobs in zip(
      seqs, batch.samplers, sampled.tokens, sampled.logprobs, strict=True
    ):
      seq.num_in_flight -= 1
      if chunk.is_prefill:
        self.num_prefilled += seq.count_prefilled(
          chunk.start + chunk.num_tokens
        )
      if seq.is_finished:
        continue
      if not chunk.samples:
        self._settle(seq, chunk.start + chunk.num_tokens)
        continue
      seq.num_pending -= chunk.samples
      if is_any_nan and math.isnan(sum(logprobs)):
        self._fail(seq)
        failed.append(types.TokenEvent(chunk.request_id, (), (), _ERROR))
        continue
      seq.tokens += tokens
      event = types.TokenEvent(chunk.request_id, tokens, logprobs, None)
      num_tokens = len(seq.tokens)
      if num_tokens > seq.full_at:  # The new ones are not in the cache yet.
        self._settle(seq, num_tokens - len(tokens))
      if num_tokens >= seq.max_len or not seq.stop_ids.isdisjoint(tokens):
        num, reason = seq.end(len(tokens))
        event = types.TokenEvent(
          chunk.request_id, tokens[:num], logprobs[:num], reason
        )
        self._finish(seq, num_tokens - len(tokens))
      events.append(event)
    if sampled.tells:
      events = sequence.with_told(events, seqs, sampled)
    return events + failed

  # -- Private --

  def _keep_told(
    self,
    seqs: Iterable[Sequence],
    batch: types.ScheduledBatch,
    prompts: Iterable[types.Told],
  ) -> list[types.TokenEvent]:
    """Keeps what is told of prompts; returns the ends of those with NaN."""
    failed = []
    for seq, chunk, told in zip(seqs, batch.samplers, prompts, strict=True):
      if seq.is_finished:
        continue
      if math.isnan(sum(at.logprob for at in told)):
        self._fail(seq)
        failed += [
          types.TokenEvent(s.key, (), (), _ERROR) for s in (seq, *seq.forks)
        ]
      seq.keep_told(chunk.start, told)
    return failed

  def _begin_forks(
    self, chunks: list[types.Chunk], seqs: list[Sequence]
  ) -> tuple[types.Fork, ...]:
    return forks_lib.begin_all(
      chunks, seqs, self.running, self.pages, self._step, self._num_groups
    )

  def _take(self, seq: Sequence, n: int) -> types.Chunk:
    start = seq.num_computed
    stop = start + n
    is_prefill = start < seq.prefill_len
    samples = 1
    tokens: tuple[int, ...] = ()
    setup = None
    if is_prefill:
      self._grow(seq, stop)
      if seq.setup is not None and not seq.is_set_up:
        setup = seq.setup._replace(tokens=tuple(seq.tokens))
        seq.is_set_up = True
      tokens = tuple(seq.tokens[start:stop])
      samples = int(stop == seq.prefill_len)
    elif not seq.num_pending:
      tokens = (seq.tokens[start],)
    seq.num_computed = stop
    seq.num_pending += samples
    seq.num_in_flight += 1
    seq.last_step = self._step
    request = seq.request
    chunk = types.Chunk(
      seq.key,
      seq.slot,
      start,
      tokens,
      n,
      seq.page_table,
      is_prefill,
      samples,
      seq.prompt_len,
      seq.seed,
      request.sampling,
      setup,
      None,
      seq.rope_len,  # By name it takes a tenth of a microsecond more.
      seq.adapter_slot,
    )
    if is_prefill and seq.prompt_logprobs is not None:
      return chunk._replace(next_token=seq.next_token(stop))
    return chunk
