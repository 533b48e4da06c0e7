# SPDX-License-Identifier: Apache-2.0
"""Drives a scheduler, plays the device, and checks every batch from outside.

What is right is said here a second time, without a look at how the scheduler
does it: from the requests, the batches and the tokens alone. Of the
scheduler's own state only the queues' order and the pages held are read.

The device is simulated (`simulated`), with the memory of its pages.
"""

from __future__ import annotations

from collections import deque
import math
from typing import Any

from sarathi_jax import config as config_lib
from sarathi_jax import page_groups
from sarathi_jax import scheduler as scheduler_lib
from sarathi_jax import types
from tests.scheduler import known as known_lib
from tests.scheduler import simulated

Known = known_lib.Known
VOCAB = simulated.VOCAB
make_request, token_at = simulated.make_request, simulated.token_at


class Checker:
  """Calls a scheduler as an engine does; AssertionError where it errs."""

  def __init__(self, scheduler: scheduler_lib.Scheduler, policy: str) -> None:
    self.scheduler = scheduler
    self.policy = policy
    self.config = scheduler.config
    self.live: dict[str, Known] = {}
    self.finished: dict[str, Known] = {}
    self._seqs: dict[str, Any] = {}
    self.num_steps = 0
    self.num_preempted = 0
    self._num_added = 0
    self._in_flight: deque[
      tuple[types.ScheduledBatch, list[Known], list[int]]
    ] = deque()
    self._memory = simulated.Memory(self.config)
    self.num_found = 0  # tokens that a chunk began after
    self.num_within = 0  # such chunks that began within a page
    # slot -> (request, position, step) that the device sampled last.
    self._slots: dict[int, tuple[Known, int, int]] = {}

  # -- What an engine does --

  def add(self, request: types.Request) -> None:
    seqs = self.scheduler.add(request)
    prompt_len = len(request.prompt_token_ids)
    max_tokens = request.sampling.max_tokens or self.config.max_model_len
    first = None
    for index, seq in enumerate(seqs):
      known = Known(
        request=request,
        index=index,
        order=self._num_added,
        max_len=min(prompt_len + max_tokens, self.config.max_model_len),
        num_tokens=prompt_len,
        num_on_host=prompt_len,
        first=first,
      )
      first = first or known
      self._seqs[known.id] = seq
      self.live[known.id] = known
      self._num_added += 1

  def remove(self, request_id: str) -> None:
    """Removes a sequence; one that has not begun, with all of its request."""
    known = self.live[request_id]
    known = known.first or known
    waiting = [k for k in self.live.values() if k.first is known]
    assert self.scheduler.remove(self._seqs[known.id]), 'not removed'
    for gone in (known, *waiting):
      assert not self.scheduler.remove(self._seqs[gone.id]), 'removed twice'
      self._forget(gone)
    self._check_state()

  def preempt_all(self) -> None:
    """Voids all that was computed."""
    self.scheduler.preempt_all()
    self._memory.clear()
    for known in self.live.values():
      known.num_computed = known.num_settled = 0
      known.num_waited = 0
      known.newest_step = -1
    self._check_state()

  @property
  def num_in_flight(self) -> int:
    return len(self._in_flight)

  @property
  def is_idle(self) -> bool:
    return not (self.live or self._in_flight)

  def schedule(self, now: float = math.inf) -> types.ScheduledBatch:
    can_launch = len(self._in_flight) < self.config.max_in_flight
    running = self._running()
    batch = self.scheduler.schedule(now)
    forked = {fork.chunk.request_id for fork in batch.forks}
    self._check_admitted(self._running() - running - forked, now)
    assert batch.step == self.num_steps, 'steps are counted from 0'
    self._check_preempted(batch)
    ready = [k for k in self.live.values() if self._is_ready(k)]
    if not batch.chunks:
      self._check_empty(can_launch, ready, now)
    else:
      assert can_launch, 'more batches in flight than allowed'
      self._check_limits(batch)
      self._check_decodes(batch, ready)
      self._launch(batch)
    self._check_state()
    return batch

  def complete(self) -> list[types.TokenEvent]:
    """Completes the oldest batch in flight."""
    batch, knowns, tokens = self._in_flight.popleft()
    expected = []
    sampled = iter(tokens)
    for known, chunk in zip(knowns, batch.samplers, strict=True):
      token = next(sampled) if chunk.samples else None
      known.num_settled = chunk.start + chunk.num_tokens
      known.flights.discard(batch.step)
      if known.is_gone or token is None:
        continue
      known.num_on_host += 1
      if token in known.request.sampling.stop_token_ids:
        known.finish_reason = types.FinishReason.STOP
      elif known.num_on_host == known.max_len:
        known.finish_reason = types.FinishReason.LENGTH
      expected.append(
        types.TokenEvent(
          known.id, (token,), (-token / VOCAB,), known.finish_reason
        )
      )
      if known.finish_reason:
        self.finished[known.id] = known
        self._forget(known)
    events = self.scheduler.complete(
      batch,
      types.Sampled.of(batch.samplers, tokens, [-t / VOCAB for t in tokens]),
    )
    assert events == expected, f'events: {events}, expected {expected}'
    self._check_state()
    return events

  def drain(self) -> None:
    """Runs everything to its end, within a bound on the number of steps."""
    lens = [k.max_len for k in self.live.values()]
    # Each step computes a token, of which a preemption voids at most a whole
    # sequence's, and the most urgent sequence is never preempted.
    last_step = self.num_steps + sum(lens) * (len(lens) + 1)
    while not self.is_idle:
      if not self.schedule().chunks:
        assert self._in_flight, f'deadlock: {list(self.live)} are stuck'
        self.complete()
      assert self.num_steps <= last_step, 'livelock'
    assert self.scheduler.is_idle, 'not idle at the end'

  # -- What must hold --

  def _is_ready(self, known: Known) -> bool:
    """Whether the next token is a decode that this step could compute."""
    newest_is_there = (
      known.newest_step not in known.flights
      or known.newest_step <= self.num_steps - self.config.num_stages
    )
    return (
      known.newest_step >= 0
      and known.num_tokens < known.max_len
      and known.num_computed == known.num_tokens - 1
      and newest_is_there
    )

  def _needs_page(self, known: Known) -> bool:
    held = self._seqs[known.id]
    num_places = len(held.pages) // len(self.config.windows)
    return known.num_computed >= num_places * self.config.page_size

  def _check_preempted(self, batch: types.ScheduledBatch) -> None:
    assert len(set(batch.preempted)) == len(batch.preempted), 'named twice'
    self.num_preempted += len(batch.preempted)
    for request_id in batch.preempted:
      known = self.live[request_id]
      assert not known.flights, f'{known.id} was preempted in flight'
      known.num_computed = known.num_settled = 0
      known.num_waited = 0
      known.newest_step = -1
    least = min((self.live[i].urgency for i in batch.preempted), default=None)
    assert least is None or all(
      self.live[i].urgency < least for i in self._running()
    ), 'preempted is who is the least urgent'

  def _check_admitted(self, admitted: set[str], now: float) -> None:
    left_out = [
      self.live[s.key]
      for s in self.scheduler.waiting
      if s.request.arrival_time <= now
    ]
    most = self.config.cache_aware_window - 1
    for one in (self.live[i] for i in admitted):
      passed = [k for k in left_out if k.urgency < one.urgency]
      assert not passed or most, 'one was admitted before one more urgent'
      assert all(k.request.priority == one.request.priority for k in passed), (
        'one was admitted before one of a more urgent priority'
      )
      assert all(k.request.client == one.request.client for k in passed), (
        "one was admitted before another client's"
      )
      assert len(passed) <= most, 'one was admitted from beyond the window'
      for known in passed:
        known.num_passed += 1
        assert known.num_passed <= most, f'{known.id}: was passed by too many'

  def _running(self) -> set[str]:
    return {s.key for s in self.scheduler.running}

  def _check_empty(
    self, can_launch: bool, ready: list[Known], now: float
  ) -> None:
    """An empty batch: all is done, or waits for a batch in flight."""
    if not can_launch:
      return
    starved = [k for k in ready if self._needs_page(k)]
    assert not ready or (
      self._in_flight
      and len(starved) * len(self.config.windows)
      > self.scheduler.pages.num_free
    ), f'nothing was scheduled though {[k.id for k in ready]} are ready'
    arrived = [k for k in self.live.values() if k.request.arrival_time <= now]
    assert self._in_flight or not arrived, (
      f'deadlock: {[k.id for k in arrived]} are stuck'
    )

  def _check_limits(self, batch: types.ScheduledBatch) -> None:
    chunks, config = batch.chunks, self.config
    limit = {
      'sarathi': config.token_budget,
      'vllm': max(config.token_budget, config.max_model_len),
      'faster_transformer': max(config.token_budget, config.max_model_len),
      'orca': max(config.token_budget, config.max_model_len)
      + config.max_num_seqs,
    }[self.policy]
    assert limit == self.scheduler.max_step_tokens(config), 'another limit'
    assert batch.num_tokens == sum(c.num_tokens for c in chunks), 'bad sum'
    assert batch.num_tokens <= limit, 'more tokens than the limit'
    assert len(chunks) <= config.max_num_seqs, 'too many sequences'
    assert len({c.request_id for c in chunks}) == len(chunks), (
      'a request is in the batch twice'
    )
    assert len({c.slot for c in batch.samplers}) == len(batch.samplers), (
      'a slot is shared'
    )
    assert sum(c.samples for c in batch.samplers) <= config.max_num_seqs, (
      'too many samples'
    )
    kinds = [c.is_prefill for c in chunks]
    assert kinds == sorted(kinds), 'decodes come first'

  def _check_decodes(
    self, batch: types.ScheduledBatch, ready: list[Known]
  ) -> None:
    decodes = {c.request_id for c in batch.chunks if not c.is_prefill}
    prefills = [c for c in batch.chunks if c.is_prefill]
    assert decodes <= {k.id for k in ready}, 'a decode that was not ready'
    if self.policy == 'vllm' and prefills:  # Stalling decodes is its way.
      assert not decodes, 'prefills and decodes in one batch'
      return
    left_out = [k for k in ready if k.id not in decodes]
    self._check_left_out(left_out, len(decodes))
    if self.policy == 'faster_transformer':
      assert not (decodes and prefills), 'prefills and decodes in one batch'

  def _check_left_out(self, left_out: list[Known], num_decodes: int) -> None:
    """Only for a batch of the next stage, which takes them first."""
    decoding = [k for k in self.live.values() if k.newest_step >= 0]
    share = math.ceil(len(decoding) / self.config.num_stages)
    assert not left_out or (
      self.policy == 'sarathi' and num_decodes == share
    ), f'stalled: {[k.id for k in left_out]}'
    most, left = 0, self.config.max_num_seqs
    while left:
      left -= math.ceil(left / self.config.num_stages)
      most += 1
    for known in decoding:
      known.num_waited = known.num_waited + 1 if known in left_out else 0
      assert known.num_waited < most, f'stalled for long: {known.id}'

  def _launch(self, batch: types.ScheduledBatch) -> None:
    knowns = []
    tokens = []
    self._memory.copy(batch.copies)
    for chunk in batch.chunks:
      known = self.live[chunk.request_id]
      self._check_chunk(batch.step, known, chunk)
      known.num_computed += chunk.num_tokens
      known.flights.add(batch.step)
      if chunk.samples:
        tokens.append(token_at(known.id, known.num_computed))
        known.num_tokens = known.num_computed + 1
        known.newest_step = batch.step
        self._slots[chunk.slot] = known, known.num_computed, batch.step
      knowns.append(known)
    for fork in batch.forks:
      known = self.live[fork.chunk.request_id]
      self._check_fork(known, batch.chunks[fork.row], fork.chunk)
      known.num_computed = known.prompt_len
      known.num_settled = known.first.num_settled  # shared, or given back
      known.num_tokens = known.prompt_len + 1
      known.flights.add(batch.step)
      known.newest_step = batch.step
      known.first = None
      tokens.append(token_at(known.id, known.num_computed))
      self._slots[fork.chunk.slot] = known, known.num_computed, batch.step
      knowns.append(known)
    self._check_none_is_left_behind(batch)
    self._in_flight.append((batch, knowns, tokens))
    self.num_steps += 1

  def _check_found(self, known: Known, chunk: types.Chunk) -> None:
    """A sequence may begin after what was completed."""
    size = self.config.page_size
    assert self.config.prefix_cache, f'{known.id}: chunks must tile'
    self._memory.check_found(
      known, chunk, self.num_steps - len(self._in_flight)
    )
    self.num_found += chunk.start
    self.num_within += chunk.start % size > 0
    known.num_computed = chunk.start
    known.num_settled = chunk.start // size * size

  def _check_fork(
    self, known: Known, ends: types.Chunk, chunk: types.Chunk
  ) -> None:
    """A fork begins in the step that ends the prefill of its prompt."""
    assert known.first is not None, f'{known.id}: begins twice'
    assert ends.request_id == known.first.id and ends.samples, (
      f'{known.id}: begins at the end of another'
    )
    assert (chunk.start, chunk.num_tokens) == (known.prompt_len, 0), (
      f'{known.id}: computes what is there'
    )
    assert chunk.start == ends.start + ends.num_tokens, 'begins elsewhere'
    assert chunk.slot == self._seqs[known.id].slot, 'another slot'
    self._check_request(known, chunk)

  def _check_none_is_left_behind(self, batch: types.ScheduledBatch) -> None:
    ended = {c.request_id for c in batch.chunks if c.samples}
    assert not any(
      k.first is not None and k.first.id in ended for k in self.live.values()
    ), 'a fork was left behind'

  def _check_request(self, known: Known, chunk: types.Chunk) -> None:
    known.seed = chunk.seed if known.seed is None else known.seed
    assert (chunk.prompt_len, chunk.seed, chunk.sampling) == (
      known.prompt_len,
      known.seed,
      known.request.sampling,
    ), f'{known.id}: not as requested'

  def _check_chunk(self, step: int, known: Known, chunk: types.Chunk) -> None:
    n, start = chunk.num_tokens, chunk.start
    stop = start + n
    assert n >= 1, f'{known.id}: a chunk without tokens'
    if start and not known.num_computed:
      self._check_found(known, chunk)
    assert start == known.num_computed, f'{known.id}: chunks must tile'
    assert stop <= known.num_tokens < known.max_len, f'{known.id}: too long'
    assert chunk.samples == (stop == known.num_tokens), (
      f'{known.id}: a chunk samples where it reaches the end, only there'
    )
    assert chunk.is_prefill == (known.newest_step < 0), (
      f'{known.id}: {chunk.is_prefill=}'
    )
    if stop <= known.num_on_host:
      assert chunk.tokens == tuple(
        known.token(p) for p in range(start, stop)
      ), f'{known.id}: wrong tokens'
    else:
      owner, position, sampled_at = self._slots[chunk.slot]
      assert (chunk.tokens, n) == ((), 1), (
        f'{known.id}: a token that only the device can know'
      )
      assert owner is known and position == start, 'slot of another sequence'
      assert sampled_at <= step - self.config.num_stages, (
        f'{known.id}: its last token is not sampled yet'
      )
    self._check_page_table(known, chunk)
    self._memory.use(known, chunk, step)
    self._check_request(known, chunk)

  def _check_page_table(self, known: Known, chunk: types.Chunk) -> None:
    num_tokens = chunk.start + chunk.num_tokens
    if self.policy in ('orca', 'faster_transformer') and not known.index:
      num_tokens = self.config.max_model_len  # They reserve for the longest.
    num_pages = math.ceil(num_tokens / self.config.page_size) * len(
      self.config.windows
    )
    assert len(chunk.page_table) == num_pages or (
      # Forks have reserved as much as there was.
      known.index
      and self.policy in ('orca', 'faster_transformer')
      and len(chunk.page_table) >= num_pages
    ), f'{chunk.request_id}: too few or too many pages'
    held = self._seqs[known.id]
    assert all(
      page in (mine, page_groups.NOWHERE)
      for page, mine in zip(held.pages, chunk.page_table, strict=False)
    ) and {*chunk.page_table} <= {*range(self.config.num_pages)}, (
      f'{chunk.request_id}: pages of another'
    )
    assert chunk.slot == held.slot, f'{chunk.request_id}: another slot'

  def _check_state(self) -> None:
    scheduler, config = self.scheduler, self.config
    running = [s.key for s in scheduler.running]
    waiting = [s.key for s in scheduler.waiting]
    behind = [k for k in self.live.values() if k.first is not None]
    assert len(running) + len(waiting) + len(behind) == len(self.live), (
      'one was lost'
    )
    for queue in running, waiting:
      urgency = [self.live[i].urgency for i in queue]
      assert urgency == sorted(urgency), 'not by urgency'
    # Of the same priority, who came first runs first.
    for known in (self.live[i] for i in waiting):
      passed_by = {
        self.live[i].request.key
        for i in running
        if self.live[i].request.priority == known.request.priority
        and self.live[i].urgency > known.urgency
      }
      assert len(passed_by) < config.cache_aware_window, (
        'not first come, first served'
      )
    seqs = [self._seqs[i] for i in running]
    seqs += [self._seqs[k.id] for k in behind]
    self._check_pages(seqs)
    slots = [s.slot for s in seqs if s.slot >= 0]
    assert len({*slots}) == len(slots), 'a slot is shared'
    assert {*slots} <= set(range(config.max_num_seqs)), 'no such slot'
    assert len(slots) + scheduler.slots.num_free() == config.max_num_seqs, (
      'slots were lost or made'
    )
    waiting_seqs = [*scheduler.waiting]
    waiting_seqs += [
      self._seqs[k.id] for k in behind if k.first and k.first.id in waiting
    ]
    assert not any(s.pages or s.slot >= 0 for s in waiting_seqs), (
      'waits with pages'
    )

  def _check_pages(self, seqs: list[Any]) -> None:
    """Each page is free, or has as many holders as hold it."""
    pool, config = self.scheduler.pages, self.config
    held: dict[int, list[tuple[Any, tuple[int, int]]]] = {}
    for seq in seqs:
      self.live[seq.key].check_windows(seq.pages, config)
      num_groups = len(config.windows)
      mine = [
        (divmod(i, num_groups), page)
        for i, page in enumerate(seq.pages)
        if page != page_groups.NOWHERE
      ]
      at = seq.num_computed // config.page_size
      mine += [((at, group), page) for group, page in enumerate(seq.copy_from)]
      assert len({page for _, page in mine}) == len(mine), (
        'a page has two owners'
      )
      for place, page in mine:
        held.setdefault(page, []).append((seq, place))
    for holders in held.values():
      if len(holders) == 1:
        continue
      places = {(id(seq.request), place) for seq, place in holders}
      is_of_prompt = len(places) == 1 and all(
        place * config.page_size < seq.prompt_len for seq, (place, _) in holders
      )
      contents = {
        (place + 1) * config.page_size <= seq.num_computed
        and (
          group,
          self.live[seq.key].content((place + 1) * config.page_size - 1),
        )
        for seq, (place, group) in holders
      }
      assert is_of_prompt or (len(contents) == 1 and all(contents)), (
        'a page has two owners'
      )
    assert set(held) <= set(range(config.num_pages)), 'no such page'
    assert len(held) + pool.num_free == config.num_pages, (
      'pages were lost or made'
    )
    assert all(pool.num_holders(p) == len(held[p]) for p in held), (
      'pages were lost or made: the pool knows of other holders'
    )

  def _forget(self, known: Known) -> None:
    known.is_gone = True
    del self.live[known.id]


def make_checker(policy: str, config: config_lib.SchedulerConfig) -> Checker:
  return Checker(scheduler_lib.policy_class(policy)(config), policy)
