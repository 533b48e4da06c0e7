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
from sarathi_jax import page_groups
from sarathi_jax import types
from sarathi_jax.scheduler import checks
from sarathi_jax.scheduler import forks as forks_lib
from sarathi_jax.scheduler import grouped
from sarathi_jax.scheduler import pace
from sarathi_jax.scheduler import pages
from sarathi_jax.scheduler import passing
from sarathi_jax.scheduler import prefix_cache
from sarathi_jax.scheduler import sequence
from sarathi_jax.scheduler import slots
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
    if not self.in_chunks:
      config.check_room(config.max_model_len)
    self.pages = pages.PagePool(config.num_pages, config.page_size)
    self._num_groups = len(config.windows)
    self._has_windows = any(config.windows)
    self.prefixes = prefix_cache.PrefixCache(config, self.pages)
    # The pace that the budget follows, if any; it learns from `pacing`.
    self.pace = (
      None if config.tbt_slo_ms is None else pace.Pace(config, num_rows)
    )
    self.waiting: deque[Sequence] = deque()  # by urgency
    self.running: list[Sequence] = []  # by urgency
    self.num_preemptions = 0
    self.num_prefilled = 0  # tokens of prompts computed, each counted once
    self.slots = slots.Slots(
      config.max_num_seqs, config.num_adjusted_seqs, config.max_loras or 0
    )
    self._in_flight: deque[tuple[types.ScheduledBatch, list[Sequence]]] = (
      deque()
    )
    self._step = 0
    self._orders = itertools.count()
    self._preempted: list[str] = []
    self._copies: list[tuple[int, int]] = []
    self._random = random.Random(config.seed)

  # -- What a policy defines --

  # Whether a request that begins as one under way does waits for it.
  waits_for_prefixes = True
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
      _end(seq)
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

  # -- What policies are built from --

  def _prefills(self) -> Iterator[Sequence]:
    """Returns running sequences with tokens left to prefill, by urgency."""
    return (s for s in self.running if s.is_prefilling)

  def _next_to_admit(self, now: float) -> Sequence | None:
    """Returns the waiting sequence that goes next, of those that have arrived.

    It is the most urgent one, or, in a window, the one that finds the most.
    None if there are no free slots for it and its forks, if another computes
    what it begins with, or if this step preempts: a newcomer would take the
    room just made.
    """
    if not self.waiting or self._preempted or not self.slots.num_free():
      return None
    seq = urgency.first_arrived(self.waiting, now, self.slots.able)
    if seq is None:
      return None
    few: Iterable[Sequence] = (seq,)
    if self.config.cache_aware_window > 1:
      few = self.prefixes.by_found(self._first_few(now))
    for seq in few:
      if len(seq.forks) >= self.slots.num_free(
        is_adjusted=seq.setup is not None
      ):
        return None
      if not self.waits_for_prefixes or not self.prefixes.is_coming(
        seq, self._step
      ):
        return seq
    return None

  def _first_few(self, now: float) -> list[Sequence]:
    return passing.first_few(
      urgency.first_turn(self.waiting, now, self.slots.able),
      self.config.cache_aware_window,
    )

  def _admit(self, now: float, reserve: int | None = None) -> Sequence | None:
    """Moves the next waiting sequence to running, if there is room now.

    Args:
      now: seconds on the engine's clock.
      reserve: the number of tokens to take pages for at once. None takes none
        now, but admits only if the whole prefill would fit beside what the
        prefills under way have yet to take. Forks count, too, as far as the
        whole cache goes.

    Returns:
      The sequence; None if none was admitted.
    """
    seq = self._next_to_admit(now)
    if seq is None:
      return None
    owed = 0
    if reserve is None:
      owed = sum(
        max(0, self._num_pages(s, s.prefill_len) - grouped.num_held(s))
        for s in self._prefills()
      )
    found = page_groups.held(self.prefixes.find(seq))
    num_pages = self._num_pages(
      seq, reserve or len(seq.tokens), is_whole=reserve is not None
    ) - len(found)
    num_free = self.pages.num_free - sum(
      not self.pages.num_holders(page) for page in found
    )
    if num_pages + owed > num_free:
      return None
    if self.config.cache_aware_window > 1:
      passing.note(self._first_few(now), seq)
    if self.slots.able is not None:
      self.slots.adapters.note(urgency.arrived(self.waiting, now), seq)
    self.waiting.remove(seq)
    self._copies += self.prefixes.begin(seq)
    seq.prefill_len = len(seq.tokens)
    for s in (seq, *seq.forks):
      self.slots.give(s)
    if seq.first_scheduled_time is None:
      seq.first_scheduled_time = now
    if reserve is not None:
      self._grow(seq, reserve)
      num_own = forks_lib.num_own_pages(
        seq, self.pages, reserve, self._num_groups
      )
      for fork in seq.forks:
        most = self.pages.num_free // self._num_groups * self._num_groups
        fork.pages = self.pages.take(min(num_own, most))
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
    while (head := self._next_to_admit(now)) and (
      self.prefixes.num_missing(head) <= budget
    ):
      new = self._admit(now, reserve=max(reserve, len(head.tokens)))
      if new is None:
        break
      budget -= new.num_left
      yield new, new.num_left

  def _num_that_fit(self, seq: Sequence) -> int:
    """Returns the tokens that could be computed next for `seq`, by pages."""
    num_places = (len(seq.pages) + self.pages.num_free) // self._num_groups
    return num_places * self.pages.page_size - seq.num_computed

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

  def _settle(self, seq: Sequence, num_tokens: int) -> None:
    """Takes note that tokens [0, num_tokens) are in the cache for sure."""
    self.prefixes.register(seq, num_tokens)
    if self._has_windows:
      grouped.give_back_behind(seq, num_tokens, self.config.windows, self.pages)

  def _num_pages(
    self, seq: Sequence, num_tokens: int, *, is_whole: bool = False
  ) -> int:
    """Returns the most pages of a prefill of so many tokens, and its forks.

    Args:
      seq: the sequence.
      num_tokens: of the prefill.
      is_whole: whether all are computed at once.
    """
    num_pages = page_groups.num_pages(
      self.config.windows,
      num_tokens,
      self.pages.page_size,
      num_tokens if is_whole else self.config.token_budget,
    )
    if seq.forks:
      num_own = forks_lib.num_own_pages(
        seq, self.pages, num_tokens, self._num_groups
      )
      num_pages += len(seq.forks) * num_own
    return min(num_pages, self.pages.num_pages)

  def _grow(self, seq: Sequence, num_tokens: int) -> None:
    num_pages = self.pages.num_for(num_tokens) * self._num_groups
    if num_pages > len(seq.pages):
      seq.pages.extend(self.pages.take(num_pages - len(seq.pages)))
      seq.page_table = (
        grouped.table_of(seq.pages) if self._has_windows else tuple(seq.pages)
      )
    seq.room = len(seq.pages) // self._num_groups * self.pages.page_size

  def _begin_forks(
    self, chunks: list[types.Chunk], seqs: list[Sequence]
  ) -> tuple[types.Fork, ...]:
    return forks_lib.begin_all(
      chunks, seqs, self.running, self.pages, self._step, self._num_groups
    )

  def _secure_decodes(self) -> list[Sequence] | None:
    """Takes the page for the next token of every ready decode.

    Preempts the least urgent sequences where pages are short.

    Returns:
      The decodes; None if the least urgent sequence is in flight, so the step
      must wait.
    """
    ready_step = self._step - self.config.num_stages
    while True:
      decodes = [
        s
        for s in self.running
        if s.num_computed >= s.prefill_len
        and (s.last_step <= ready_step or not s.num_in_flight)
        and len(s.tokens) + s.num_pending < s.max_len
      ]
      starved = [s for s in decodes if s.num_computed == s.room]
      num_places = sum(
        forks_lib.needs_pages(s, self.pages, self._num_groups) for s in starved
      )
      if num_places * self._num_groups <= self.pages.num_free:
        for s in starved:
          self._make_room(s)
        return decodes
      # Only the least urgent, even if others have more pages: so the most
      # urgent always makes progress.
      least_urgent = self.running[-1]
      if least_urgent.num_in_flight:
        return None
      self._preempt(least_urgent)

  def _make_room(self, seq: Sequence) -> None:
    """Gives a decode the pages that it needs for its next token."""
    if not seq.copy_from or forks_lib.needs_pages(
      seq, self.pages, self._num_groups
    ):
      self._grow(seq, seq.num_computed + 1)
    if seq.copy_from:
      self._copies += forks_lib.own_shared_page(seq, self.pages)

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

  def _preempt(self, seq: Sequence) -> None:
    assert not seq.num_in_flight and not seq.num_pending
    self._release(seq, seq.num_computed)
    seq.num_computed = seq.prefill_len = 0
    seq.num_preemptions += 1
    self.num_preemptions += 1
    urgency.insert(self.waiting, seq)
    self._preempted.append(seq.key)

  def _fail(self, seq: Sequence) -> None:
    """Ends a sequence of which something is NaN, and maybe its pages."""
    self.pages.unregister(page_groups.held(seq.pages))
    self._finish(seq, 0)

  def _finish(self, seq: Sequence, num_cached: int) -> None:
    self._release(seq, num_cached)
    _end(seq)

  def _release(self, seq: Sequence, num_cached: int) -> None:
    """Takes back all; of the cache there are `num_cached` tokens for sure."""
    self.running.remove(seq)
    self.prefixes.end(seq, num_cached)
    for s in (seq, *seq.forks):
      forks_lib.release(s, self.pages)
      self.slots.take_back(s)


def _end(seq: Sequence) -> None:
  for s in (seq, *seq.forks):
    s.is_finished = True
