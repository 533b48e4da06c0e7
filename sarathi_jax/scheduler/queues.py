# SPDX-License-Identifier: Apache-2.0
"""Who waits, who runs, and the pages and slots of those who do.

A sequence waits until there is room for it, runs until it ends, or gives all
back and waits again. `base` makes batches of those who run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

from sarathi_jax import config as config_lib
from sarathi_jax import page_groups
from sarathi_jax.scheduler import forks as forks_lib
from sarathi_jax.scheduler import grouped
from sarathi_jax.scheduler import pages
from sarathi_jax.scheduler import passing
from sarathi_jax.scheduler import prefix_cache
from sarathi_jax.scheduler import sequence
from sarathi_jax.scheduler import slots
from sarathi_jax.scheduler import urgency

Sequence = sequence.Sequence


class Queues:
  """Owns the queues, the sequences, and what they hold.

  Args:
    config: the scheduler's limits.

  Attributes:
    config: the scheduler's limits.
    pages: the pool of pages.
    prefixes: what can be found in them.
    waiting: who waits, by urgency.
    running: who runs, by urgency.
    num_preemptions: how often one had to give all back.
    slots: the device's.
  """

  # Whether a request that begins as one under way does waits for it.
  waits_for_prefixes = True

  def __init__(self, config: config_lib.SchedulerConfig) -> None:
    self.config = config
    self.pages = pages.PagePool(config.num_pages, config.page_size)
    self._num_groups = len(config.windows)
    self._has_windows = any(config.windows)
    self.prefixes = prefix_cache.PrefixCache(config, self.pages)
    self.waiting: deque[Sequence] = deque()
    self.running: list[Sequence] = []
    self.num_preemptions = 0
    self.slots = slots.Slots(
      config.max_num_seqs, config.num_adjusted_seqs, config.max_loras or 0
    )
    self._step = 0  # the number of the next one
    # What the next step preempts and copies.
    self._preempted: list[str] = []
    self._copies: list[tuple[int, int]] = []

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

  # -- What keeps those who run going --

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
    end(seq)

  def _release(self, seq: Sequence, num_cached: int) -> None:
    """Takes back all; of the cache there are `num_cached` tokens for sure."""
    self.running.remove(seq)
    self.prefixes.end(seq, num_cached)
    for s in (seq, *seq.forks):
      forks_lib.release(s, self.pages)
      self.slots.take_back(s)


def end(seq: Sequence) -> None:
  """Marks a sequence and its forks as ended."""
  for s in (seq, *seq.forks):
    s.is_finished = True
