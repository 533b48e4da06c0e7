# SPDX-License-Identifier: Apache-2.0
"""The base of every policy: queues, pages, preemption and completion.

A policy is one generator, `_plan`. Whatever it plans, the base class ensures
that

- each ready decode has a page for its next token, or the step waits until
  enough batches in flight have completed;
- the least urgent sequences give up their pages first, and are recomputed
  later;
- what is in flight is never preempted;
- the most urgent requests are admitted first.
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
from sarathi_jax import errors
from sarathi_jax import types
from sarathi_jax.scheduler import pace
from sarathi_jax.scheduler import pages
from sarathi_jax.scheduler import sequence
from sarathi_jax.scheduler import step_time
from sarathi_jax.scheduler import urgency

Sequence = sequence.Sequence
_ERROR = types.FinishReason.ERROR


class Scheduler(abc.ABC):
  """Owns the queues, the sequences and the pages.

  One thread at a time may call it, except `check`, which is pure.

  Args:
    config: the scheduler's limits.
    num_rows: returns the rows that a batch of so many tokens is padded to; the
      runner's.
  """

  def __init__(
    self, config: config_lib.SchedulerConfig, num_rows: step_time.NumRows = int
  ) -> None:
    self.config = config
    self.pages = pages.PagePool(config.num_pages, config.page_size)
    # The pace that the budget follows, if any; it learns from `pacing`.
    self.pace = (
      None if config.tbt_slo_ms is None else pace.Pace(config, num_rows)
    )
    self.waiting: deque[Sequence] = deque()  # by urgency
    self.running: list[Sequence] = []  # by urgency
    self.num_preemptions = 0
    self.num_prefilled = 0  # tokens of prompts computed, each counted once
    # Free slots; those of sequences whose logits may be adjusted, and others.
    slots = list(range(config.max_num_seqs))[::-1]
    num_others = config.max_num_seqs - config.num_adjusted_seqs
    self._slots, self._adjusted_slots = slots[:num_others], slots[num_others:]
    self._in_flight: deque[tuple[types.ScheduledBatch, list[Sequence]]] = (
      deque()
    )
    self._step = 0
    self._orders = itertools.count()
    self._preempted: list[str] = []
    self._random = random.Random(config.seed)

  # -- What a policy defines --

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
    num_tokens = len(request.prompt_token_ids)
    if not num_tokens:
      raise errors.InvalidRequestError(
        f'{request.request_id}: the prompt is empty; it must have at least '
        'one token.'
      )
    if num_tokens >= self.config.max_model_len:
      raise errors.InvalidRequestError(
        f'{request.request_id}: a prompt of {num_tokens} tokens leaves no '
        f'room to generate; max_model_len={self.config.max_model_len}.'
      )
    if request.sampling.is_adjusted and not self.config.num_adjusted_seqs:
      raise errors.UnsupportedError(
        f'{request.request_id}: its sampling needs memory that this engine '
        'does not keep, as max_adjusted_seqs=0: penalties, biases, token ids '
        'and words to allow or to rule out, min_tokens.'
      )

  def add(
    self,
    request: types.Request,
    bad_words: tuple[tuple[int, ...], ...] = (),
  ) -> Sequence:
    """Queues a request that `check` accepted.

    Args:
      request: the request.
      bad_words: the token ids of each of its bad words.

    Returns:
      Its progress; for reading only.
    """
    num_tokens = len(request.prompt_token_ids)
    assert 0 < num_tokens < self.config.max_model_len, num_tokens
    seed = request.sampling.seed
    seq = Sequence.of(
      request,
      self.config,
      next(self._orders),
      self._random.getrandbits(31) if seed is None else seed,
      bad_words,
    )
    urgency.insert(self.waiting, seq)
    return seq

  def remove(self, seq: Sequence) -> bool:
    """Ends a request now and frees its pages; returns False if it has ended.

    Results of batches in flight are void for it. Its pages may be reused at
    once, as the device runs batches in order.
    """
    if seq.is_finished:
      return False
    if seq.slot < 0:
      self.waiting.remove(seq)
      seq.is_finished = True
    else:
      self._finish(seq)
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
      for seq, chunk in zip(seqs, batch.chunks, strict=True):
        seq.num_in_flight -= 1
        seq.num_pending -= chunk.samples
    self._in_flight.clear()
    self.preempt_all()

  def preempt_all(self) -> None:
    """Takes back all pages; every running sequence will be recomputed."""
    assert not self._in_flight
    for seq in reversed(list(self.running)):
      self._preempt(seq)

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
    self._preempted = []
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
      self._step, tuple(chunks), num_tokens, tuple(self._preempted)
    )
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
      seqs, batch.chunks, sampled.tokens, sampled.logprobs, strict=True
    ):
      seq.num_in_flight -= 1
      if chunk.is_prefill:
        self.num_prefilled += seq.count_prefilled(
          chunk.start + chunk.num_tokens
        )
      if seq.is_finished or not chunk.samples:
        continue
      seq.num_pending -= chunk.samples
      if is_any_nan and math.isnan(sum(logprobs)):
        self._finish(seq)
        failed.append(types.TokenEvent(chunk.request_id, (), (), _ERROR))
        continue
      seq.tokens += tokens
      event = types.TokenEvent(chunk.request_id, tokens, logprobs, None)
      if len(seq.tokens) >= seq.max_len or not seq.stop_ids.isdisjoint(tokens):
        num, reason = seq.end(len(tokens))
        event = types.TokenEvent(
          chunk.request_id, tokens[:num], logprobs[:num], reason
        )
        self._finish(seq)
      events.append(event)
    if sampled.tells:
      events = _told(events, seqs, sampled)
    return events + failed

  # -- What policies are built from --

  def _prefills(self) -> Iterator[Sequence]:
    """Returns running sequences with tokens left to prefill, by urgency."""
    return (s for s in self.running if s.is_prefilling)

  def _next_to_admit(self, now: float) -> Sequence | None:
    """Returns the most urgent waiting sequence that has arrived, or None.

    None if it has no free slot, or if this step preempts: a newcomer would take
    the room just made.
    """
    if not self.waiting or self._preempted:
      return None
    if not (self._slots or self._adjusted_slots):
      return None
    seq = urgency.first_arrived(self.waiting, now)
    return seq if seq is not None and self._free_slots(seq) else None

  def _free_slots(self, seq: Sequence) -> list[int]:
    """Returns the free slots for a sequence, which takes the last of them."""
    if seq.setup is None and self._slots:
      return self._slots
    return self._adjusted_slots

  def _admit(self, now: float, reserve: int | None = None) -> Sequence | None:
    """Moves the next waiting sequence to running, if there is room now.

    Args:
      now: seconds on the engine's clock.
      reserve: the number of tokens to take pages for at once. None takes none
        now, but admits only if the whole prefill would fit beside what the
        prefills under way have yet to take.

    Returns:
      The sequence; None if none was admitted.
    """
    seq = self._next_to_admit(now)
    if seq is None:
      return None
    num_pages = self.pages.num_for(
      len(seq.tokens) if reserve is None else reserve
    )
    owed = 0
    if reserve is None:
      owed = sum(
        self.pages.num_for(s.prefill_len) - len(s.pages)
        for s in self._prefills()
      )
    if num_pages + owed > self.pages.num_free:
      return None
    self.waiting.remove(seq)
    seq.prefill_len = len(seq.tokens)
    seq.slot = self._free_slots(seq).pop()
    seq.is_set_up = False
    if seq.first_scheduled_time is None:
      seq.first_scheduled_time = now
    if reserve is not None:
      self._grow(seq, reserve)
    urgency.insert(self.running, seq)
    return seq

  def _admit_whole(
    self,
    now: float,
    budget: int,
    reserve: int = 0,
  ) -> Iterator[tuple[Sequence, int]]:
    """Admits whole prompts, and yields them as `_plan` does.

    Args:
      now: seconds on the engine's clock.
      budget: the most tokens of all of them.
      reserve: the number of tokens to take pages for, where that is more
        than a prompt has.
    """
    while (head := self._next_to_admit(now)) and len(head.tokens) <= budget:
      new = self._admit(now, reserve=max(reserve, len(head.tokens)))
      if new is None:
        break
      budget -= new.num_left
      yield new, new.num_left

  def _num_that_fit(self, seq: Sequence) -> int:
    """Returns the tokens that could be computed next for `seq`, by pages."""
    num_pages = len(seq.pages) + self.pages.num_free
    return num_pages * self.pages.page_size - seq.num_computed

  # -- Private --

  def _keep_told(
    self,
    seqs: Iterable[Sequence],
    batch: types.ScheduledBatch,
    prompts: Iterable[types.Told],
  ) -> list[types.TokenEvent]:
    """Keeps what is told of prompts; returns the ends of those with NaN."""
    failed = []
    for seq, chunk, told in zip(seqs, batch.chunks, prompts, strict=True):
      if seq.is_finished:
        continue
      if math.isnan(sum(at.logprob for at in told)):
        self._finish(seq)
        failed.append(types.TokenEvent(chunk.request_id, (), (), _ERROR))
      seq.keep_told(chunk.start, told)
    return failed

  def _grow(self, seq: Sequence, num_tokens: int) -> None:
    missing = self.pages.num_for(num_tokens) - len(seq.pages)
    if missing > 0:
      seq.pages.extend(self.pages.take(missing))
      seq.page_table = tuple(seq.pages)

  def _secure_decodes(self) -> list[Sequence] | None:
    """Takes the page for the next token of every ready decode.

    Preempts the least urgent sequences where pages are short.

    Returns:
      The decodes; None if the least urgent sequence is in flight, so the step
      must wait.
    """
    ready_step = self._step - self.config.num_stages
    page_size = self.pages.page_size
    while True:
      decodes = [
        s
        for s in self.running
        if s.num_computed >= s.prefill_len
        and (s.last_step <= ready_step or not s.num_in_flight)
        and len(s.tokens) + s.num_pending < s.max_len
      ]
      starved = [
        s for s in decodes if s.num_computed == len(s.pages) * page_size
      ]
      if len(starved) <= self.pages.num_free:
        for s in starved:
          self._grow(s, s.num_computed + 1)
        return decodes
      # Only the least urgent, even if others have more pages: so the most
      # urgent always makes progress.
      least_urgent = self.running[-1]
      if least_urgent.num_in_flight:
        return None
      self._preempt(least_urgent)

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
      request.key,
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
    )
    if is_prefill and seq.prompt_logprobs is not None:
      return chunk._replace(next_token=seq.next_token(stop))
    return chunk

  def _preempt(self, seq: Sequence) -> None:
    assert not seq.num_in_flight and not seq.num_pending
    self._release(seq)
    seq.num_computed = seq.prefill_len = 0
    seq.num_preemptions += 1
    self.num_preemptions += 1
    urgency.insert(self.waiting, seq)
    self._preempted.append(seq.request.key)

  def _finish(self, seq: Sequence) -> None:
    self._release(seq)
    seq.is_finished = True

  def _release(self, seq: Sequence) -> None:
    self.running.remove(seq)
    self.pages.give_back(seq.pages)
    is_adjusted_slot = seq.slot < self.config.num_adjusted_seqs
    (self._adjusted_slots if is_adjusted_slot else self._slots).append(seq.slot)
    seq.slot = -1
    seq.pages = []
    seq.page_table = ()


def _told(
  events: list[types.TokenEvent],
  seqs: Iterable[Sequence],
  sampled: types.Sampled,
) -> list[types.TokenEvent]:
  """Returns events with what is told of their tokens, and of prompts, once."""
  told = sampled.told or itertools.repeat(())
  of = {seq.request.key: (seq, at) for seq, at in zip(seqs, told, strict=False)}
  return [
    event._replace(
      told=of[event.request_id][1][: len(event.tokens)],
      prompt_logprobs=of[event.request_id][0].take_told(),
    )
    for event in events
  ]
