# SPDX-License-Identifier: Apache-2.0
"""The checker finds fault with schedulers that are broken on purpose."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import itertools
import random

import pytest

from sarathi_jax import config as config_lib
from sarathi_jax import types
from sarathi_jax.scheduler import grouped
from sarathi_jax.scheduler import pages
from sarathi_jax.scheduler import passing
from sarathi_jax.scheduler import prefix_cache
from sarathi_jax.scheduler import sarathi
from sarathi_jax.scheduler import sequence
from sarathi_jax.scheduler import urgency
from tests.scheduler import checker as checker_lib
from tests.scheduler import properties_test

Plan = Iterator[tuple[sequence.Sequence, int]]


class LeavesOutADecode(sarathi.SarathiScheduler):
  def _plan(self, now: float, decodes: list[sequence.Sequence]) -> Plan:
    return super()._plan(now, decodes[:-1] if len(decodes) > 1 else decodes)


class ExceedsTheBudget(sarathi.SarathiScheduler):
  def _plan(self, now: float, decodes: list[sequence.Sequence]) -> Plan:
    for seq, n in super()._plan(now, decodes):
      yield seq, min(seq.num_left, 2 * n) if n > 1 else n


class SkipsAToken(sarathi.SarathiScheduler):
  def _take(self, seq: sequence.Sequence, n: int) -> types.Chunk:
    if seq.num_computed and seq.num_left > n:
      seq.num_computed += 1
    return super()._take(seq, n)


class TakesPromptsTwice(sarathi.SarathiScheduler):
  def _plan(self, now: float, decodes: list[sequence.Sequence]) -> Plan:
    for seq, n in super()._plan(now, decodes):
      if n > 1:
        yield seq, 1
      yield seq, max(1, n - 1)


class CarriesAStaleToken(sarathi.SarathiScheduler):
  def _take(self, seq: sequence.Sequence, n: int) -> types.Chunk:
    chunk = super()._take(seq, n)
    return chunk._replace(tokens=chunk.tokens or (seq.tokens[-1],))


class SamplesTooEarly(sarathi.SarathiScheduler):
  def _take(self, seq: sequence.Sequence, n: int) -> types.Chunk:
    return super()._take(seq, n)._replace(samples=True)


class AdmitsTheLastFirst(sarathi.SarathiScheduler):
  def _admit(
    self, now: float, reserve: int | None = None
  ) -> sequence.Sequence | None:
    self.waiting.reverse()
    try:
      return super()._admit(now, reserve)
    finally:
      self.waiting.reverse()


class PreemptsTheOldest(sarathi.SarathiScheduler):
  def _preempt(self, seq: sequence.Sequence) -> None:
    oldest = next(s for s in self.running if not s.num_in_flight)
    super()._preempt(oldest)


class PreemptsTheYoungest(sarathi.SarathiScheduler):
  """Whatever its priority."""

  def _preempt(self, seq: sequence.Sequence) -> None:
    super()._preempt(
      max(
        (s for s in self.running if not s.num_in_flight),
        key=lambda s: s.urgency[1],
      )
    )


class AdmitsByArrival(sarathi.SarathiScheduler):
  def _next_to_admit(self, now: float) -> sequence.Sequence | None:
    if super()._next_to_admit(now) is None:
      return None
    return min(
      (s for s in self.waiting if s.request.arrival_time <= now),
      key=lambda s: s.urgency[1],
    )


class PreemptsInFlight(sarathi.SarathiScheduler):
  def _secure_decodes(self) -> list[sequence.Sequence] | None:
    while (decodes := super()._secure_decodes()) is None:
      youngest = self.running[-1]
      youngest.num_in_flight = youngest.num_pending = 0
      self._preempt(youngest)
    return decodes


class NeverPreempts(sarathi.SarathiScheduler):
  def _secure_decodes(self) -> list[sequence.Sequence] | None:
    return super()._secure_decodes() if self.pages.num_free else None

  def _preempt(self, seq: sequence.Sequence) -> None:
    pass


class CountsTheOutputAnew(sarathi.SarathiScheduler):
  """A request may generate max_tokens again after each preemption."""

  def _preempt(self, seq: sequence.Sequence) -> None:
    super()._preempt(seq)
    seq.max_len = min(self.config.max_model_len, seq.max_len + seq.num_output)


class SharesASlot(sarathi.SarathiScheduler):
  def _admit(
    self, now: float, reserve: int | None = None
  ) -> sequence.Sequence | None:
    seq = super()._admit(now, reserve)
    if seq is not None:
      seq.slot = 0
    return seq


class ForgetsAPage(sarathi.SarathiScheduler):
  def _release(self, seq: sequence.Sequence, num_cached: int) -> None:
    seq.pages = seq.pages[1:]
    super()._release(seq, 0)


class GivesAPageTwice(sarathi.SarathiScheduler):
  def __init__(self, config: config_lib.SchedulerConfig) -> None:
    super().__init__(config)
    self.pages = _DoublePool(config.num_pages, config.page_size)
    self.prefixes = prefix_cache.PrefixCache(config, self.pages)


class _DoublePool(pages.PagePool):
  def take(self, num_pages: int) -> list[int]:
    super().take(num_pages)
    return list(range(num_pages))


class TakesTooManyPages(sarathi.SarathiScheduler):
  def _grow(self, seq: sequence.Sequence, num_tokens: int) -> None:
    spare = self.pages.num_free > 2
    super()._grow(seq, num_tokens + spare * self.pages.page_size)


class WritesToASharedPage(sarathi.SarathiScheduler):
  def _make_room(self, seq: sequence.Sequence) -> None:
    if seq.copy_from:
      self.pages.give_back(self.pages.take(1))
      seq.pages += seq.copy_from
      seq.page_table = tuple(seq.pages)
      seq.copy_from = ()
    super()._make_room(seq)


class MakesNoCopy(sarathi.SarathiScheduler):
  def _make_room(self, seq: sequence.Sequence) -> None:
    super()._make_room(seq)
    self._copies.clear()


class CopiesTooLate(sarathi.SarathiScheduler):
  _late: tuple[tuple[int, int], ...] = ()

  def schedule(self, now: float) -> types.ScheduledBatch:
    batch = super().schedule(now)
    if batch.chunks:
      late, self._late = self._late, batch.copies
      self._in_flight[-1] = (
        batch._replace(copies=late),
        self._in_flight[-1][1],
      )
      return self._in_flight[-1][0]
    return batch


class GivesUpThePageToCopy(sarathi.SarathiScheduler):
  def _finish(self, seq: sequence.Sequence, num_cached: int) -> None:
    for other in self.running:
      if other is not seq and {*other.copy_from} & {*seq.pages}:
        other.copy_from = ()
        other.room = len(other.pages) * self.pages.page_size
    super()._finish(seq, num_cached)


class ForgetsForks(sarathi.SarathiScheduler):
  def _begin_forks(
    self, chunks: list[types.Chunk], seqs: list[sequence.Sequence]
  ) -> tuple[types.Fork, ...]:
    return ()


class IgnoresWhatIsBefore(sarathi.SarathiScheduler):
  """Pages of the same tokens, whatever is before them, are taken as equal."""

  def __init__(self, config: config_lib.SchedulerConfig) -> None:
    super().__init__(config)
    self.prefixes = _Unchained(config, self.pages)


class _Unchained(prefix_cache.PrefixCache):
  def _make_keys(self, seq: sequence.Sequence, num_pages: int) -> None:
    size = self._pool.page_size
    for i in range(len(seq.keys), num_pages):
      seq.keys.append(repr(seq.tokens[i * size : (i + 1) * size]).encode())
      seq.contents.append(b'')


class IgnoresTheSalt(sarathi.SarathiScheduler):
  def __init__(self, config: config_lib.SchedulerConfig) -> None:
    super().__init__(config)
    self.prefixes = _Unsalted(config, self.pages)


class _Unsalted(prefix_cache.PrefixCache):
  def _root(self, request: types.Request) -> bytes:
    return b''


class RegistersWhatIsInFlight(sarathi.SarathiScheduler):
  def _take(self, seq: sequence.Sequence, n: int) -> types.Chunk:
    chunk = super()._take(seq, n)
    self.prefixes.register(seq, min(seq.num_computed, len(seq.tokens)))
    return chunk


class FindsThePageOfAnother(sarathi.SarathiScheduler):
  """Does not hold what it found, so that others may take it."""

  def __init__(self, config: config_lib.SchedulerConfig) -> None:
    super().__init__(config)
    self.pages = _ForgetfulPool(config.num_pages, config.page_size)
    self.prefixes = prefix_cache.PrefixCache(config, self.pages)


class _ForgetfulPool(pages.PagePool):
  def give_back(self, pages: Sequence[int]) -> None:
    super().give_back([p for p in pages if self.num_holders(p)])

  def share(self, pages: Sequence[int]) -> list[int]:
    return list(pages)


class _Window(sarathi.SarathiScheduler):
  """Chooses from others than it may."""

  def _first_few(self, now: float) -> list[sequence.Sequence]:
    few = super()._first_few(now)
    return self._wrong(few, now) if self.config.cache_aware_window > 1 else few

  def _wrong(
    self, few: list[sequence.Sequence], now: float
  ) -> list[sequence.Sequence]:
    raise NotImplementedError


class LooksBeyondTheWindow(_Window):
  def _wrong(
    self, few: list[sequence.Sequence], now: float
  ) -> list[sequence.Sequence]:
    return list(urgency.first_turn(self.waiting, now))


class PassesForEver(_Window):
  """Does not count who was passed."""

  def _wrong(
    self, few: list[sequence.Sequence], now: float
  ) -> list[sequence.Sequence]:
    turn = urgency.first_turn(self.waiting, now)
    return list(itertools.islice(turn, self.config.cache_aware_window))


class PassesTheMoreUrgent(_Window):
  def _wrong(
    self, few: list[sequence.Sequence], now: float
  ) -> list[sequence.Sequence]:
    arrived = [s for s in self.waiting if s.request.arrival_time <= now]
    client = arrived[0].request.client
    return passing.first_few(
      itertools.takewhile(lambda s: s.request.client == client, arrived),
      self.config.cache_aware_window,
    )


class PassesOtherClients(_Window):
  def _wrong(
    self, few: list[sequence.Sequence], now: float
  ) -> list[sequence.Sequence]:
    arrived = [s for s in self.waiting if s.request.arrival_time <= now]
    priority = arrived[0].request.priority
    return passing.first_few(
      (s for s in arrived if s.request.priority == priority),
      self.config.cache_aware_window,
    )


class GivesBackTooEarly(sarathi.SarathiScheduler):
  def _settle(self, seq: sequence.Sequence, num_tokens: int) -> None:
    super()._settle(seq, num_tokens)
    if self._has_windows:
      grouped.give_back_behind(
        seq, seq.num_computed, self.config.windows, self.pages
      )


class KeepsWhatNobodyReads(sarathi.SarathiScheduler):
  def _settle(self, seq: sequence.Sequence, num_tokens: int) -> None:
    self.prefixes.register(seq, num_tokens)


class FindsNoWindow(sarathi.SarathiScheduler):
  """Takes a beginning for found of which the last window is missing."""

  def __init__(self, config: config_lib.SchedulerConfig) -> None:
    super().__init__(config)
    self.prefixes._windows = tuple(w and 1 for w in config.windows)


class AdmitsNobody(sarathi.SarathiScheduler):
  def _admit(
    self, now: float, reserve: int | None = None
  ) -> sequence.Sequence | None:
    return None


# class -> a part of what the checker says of it.
BROKEN: Mapping[type[sarathi.SarathiScheduler], str] = {
  LeavesOutADecode: 'stalled',
  ExceedsTheBudget: 'more tokens than the limit',
  SkipsAToken: 'chunks must tile',
  TakesPromptsTwice: 'a request is in the batch twice',
  CarriesAStaleToken: 'a token that only the device can know',
  SamplesTooEarly: 'a chunk samples where it reaches the end',
  AdmitsTheLastFirst: 'before one more urgent',
  PreemptsTheOldest: 'preempted is who is the least urgent',
  PreemptsTheYoungest: 'preempted is who is the least urgent',
  AdmitsByArrival: 'before one more urgent',
  PreemptsInFlight: 'was preempted in flight',
  NeverPreempts: 'nothing was scheduled',
  CountsTheOutputAnew: 'events',
  SharesASlot: 'a slot is shared',
  ForgetsAPage: 'pages were lost or made',
  GivesAPageTwice: 'a page has two owners',
  TakesTooManyPages: 'too few or too many pages',
  WritesToASharedPage: 'something else lies where its tokens should',
  MakesNoCopy: 'something else lies where its tokens should',
  CopiesTooLate: 'something else lies where its tokens should',
  GivesUpThePageToCopy: 'pages were lost or made',
  ForgetsForks: 'a fork was left behind',
  IgnoresWhatIsBefore: 'something else lies where its tokens should',
  IgnoresTheSalt: 'something else lies where its tokens should',
  RegistersWhatIsInFlight: 'found what is not computed yet',
  FindsThePageOfAnother: 'pages were lost or made',
  GivesBackTooEarly: 'gave back what is yet to be read',
  KeepsWhatNobodyReads: 'keeps what nobody reads',
  FindsNoWindow: 'something else lies where its tokens should',
  LooksBeyondTheWindow: 'from beyond the window',
  PassesForEver: 'was passed by too many',
  PassesTheMoreUrgent: 'before one of a more urgent priority',
  PassesOtherClients: "before another client's",
  AdmitsNobody: 'deadlock',
}


# Seeds of workloads whose layers have windows; the others' have none.
_WINDOWS = range(130, 160)


def first_fault(
  scheduler_class: Callable[
    [config_lib.SchedulerConfig], sarathi.SarathiScheduler
  ],
  seeds: Iterable[int] = range(_WINDOWS.stop),
) -> str | None:
  """What the checker says of a class on the soak's workloads."""
  for seed in seeds:
    rng = random.Random(seed)
    make = (
      properties_test.make_workload
      if not 100 <= seed < 130
      else properties_test.make_queue
    )
    workload = make(rng)
    if seed in _WINDOWS:
      workload = properties_test.with_windows(workload, rng, 'sarathi')
    checker = checker_lib.Checker(scheduler_class(workload.config), 'sarathi')
    try:
      properties_test.drive(checker, workload, rng)
    except AssertionError as error:
      return str(error)
  return None


@pytest.mark.parametrize(
  ('broken', 'message'), BROKEN.items(), ids=[c.__name__ for c in BROKEN]
)
def test_finds_the_fault(
  broken: type[sarathi.SarathiScheduler], message: str
) -> None:
  needs_windows = broken in (GivesBackTooEarly, KeepsWhatNobodyReads)
  needs_windows |= broken is FindsNoWindow
  fault = first_fault(broken, *[_WINDOWS] * needs_windows)
  assert fault is not None
  assert message in fault


def test_finds_no_fault_with_the_real_one() -> None:
  assert first_fault(sarathi.SarathiScheduler) is None
