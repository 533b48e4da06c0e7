# SPDX-License-Identifier: Apache-2.0
"""Measures steps for the budget that follows the time between tokens.

`PacedRunner` stands between the engine and any runner, a device's or the
simulator's. It tells the scheduler's model the time of each step. Before the
first request, `warm_up` tries steps of all kinds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
import statistics
from typing import Any, NamedTuple

from absl import logging

from sarathi_jax import config as config_lib
from sarathi_jax import errors
from sarathi_jax import types
from sarathi_jax.scheduler import base
from sarathi_jax.scheduler import runner as runner_lib
from sarathi_jax.scheduler import step_time

_GREEDY = types.SamplingParams(temperature=0, ignore_eos=True)
# Tries of each kind of step; the first one may still load or allocate.
_TRIES = 4
# A target missed by less is not reported; one missed by more, once a minute.
_TOLD_OVER, _TOLD_EVERY_S = 1.1, 60.0
# Tokens of chunks.
_SIZES = tuple(8 << i for i in range(12))


class _Pending(NamedTuple):
  """A batch on its way, and what is needed to time it."""

  inner: runner_lib.Pending
  load: step_time.Load
  launched: float
  num_before: int  # batches in flight when it was launched


class PacedRunner:
  """A `runner_lib.Runner` that times another runner's steps.

  Args:
    inner: computes the steps.
    scheduler: has a `pace`, which learns from them.
    clock: the engine's; returns seconds.
  """

  def __init__(
    self,
    inner: runner_lib.Runner,
    scheduler: base.Scheduler,
    clock: Callable[[], float],
  ) -> None:
    assert scheduler.pace is not None
    assert scheduler.config.tbt_slo_ms is not None
    self._inner = inner
    self._pace = scheduler.pace
    self._model = scheduler.pace.model
    self._slo_ms = scheduler.config.tbt_slo_ms
    self._told = -_TOLD_EVERY_S
    self._num_stages = scheduler.config.num_stages
    self._clock = clock
    self._in_flight: deque[_Pending] = deque()
    self._last_done = 0.0

  def launch(self, batch: types.ScheduledBatch) -> _Pending:
    launched = self._clock()
    pending = _Pending(
      self._inner.launch(batch),
      step_time.load_of(batch.chunks),
      launched,
      len(self._in_flight),
    )
    self._in_flight.append(pending)
    return pending

  def mask(self, pending: _Pending, masks: Mapping[int, Any]) -> None:
    self._inner.mask(pending.inner, masks)

  def fetch(self, pending: _Pending) -> types.Sampled:
    sampled = self._inner.fetch(pending.inner)
    assert self._in_flight.popleft() is pending
    now = self._clock()
    # The time it added to the batches before it. A batch alone in the pipeline
    # passes all stages, each of which takes a part of the time.
    seconds = now - max(pending.launched, self._last_done)
    if not pending.num_before:
      seconds /= self._num_stages
    self._model.observe(pending.load, seconds)
    self._last_done = now
    self._tell(now)
    return sampled

  def _tell(self, now: float) -> None:
    """Logs a warning where the target can't be kept."""
    needed_ms = self._pace.needed_s(now) * 1e3
    if needed_ms > _TOLD_OVER * self._slo_ms and (
      now - self._told >= _TOLD_EVERY_S
    ):
      self._told = now
      logging.warning(
        'tbt_slo_ms=%g cannot be held at this load; at least %.0f ms.',
        self._slo_ms,
        needed_ms,
      )

  def num_rows(self, num_tokens: int) -> int:
    return self._inner.num_rows(num_tokens)

  def recover(self) -> None:
    self._in_flight.clear()
    self._inner.recover()


def paced(
  inner: runner_lib.Runner,
  scheduler: base.Scheduler,
  clock: Callable[[], float],
) -> runner_lib.Runner:
  """Returns the runner for an engine: paced and warm, if its scheduler paces.

  Raises:
    ConfigError: even a step of one decode takes longer than the target.
  """
  if scheduler.pace is None:
    return inner
  runner = PacedRunner(inner, scheduler, clock)
  fastest = warm_up(inner, scheduler, clock)
  slo_ms = scheduler.config.tbt_slo_ms
  assert slo_ms is not None
  if fastest * 1e3 > slo_ms:
    raise errors.ConfigError(
      f'tbt_slo_ms={slo_ms:g}: a step of a single decode takes '
      f'{fastest * 1e3:.3g} ms here, so nothing can meet it.'
    )
  return runner


def warm_up(
  runner: runner_lib.Runner,
  scheduler: base.Scheduler,
  clock: Callable[[], float],
) -> float:
  """Times steps of all kinds, before there are requests.

  The steps write to pages that hold nothing yet.

  Returns:
    The time of a step of a single decode, through all stages, seconds.
  """
  assert scheduler.pace is not None
  alone = 0.0
  for kind in _kinds(scheduler.config):
    chunks = tuple(_chunks(kind, scheduler.config))
    batch = types.ScheduledBatch(0, chunks, sum(c.num_tokens for c in chunks))
    times = []
    for _ in range(_TRIES):
      start = clock()
      runner.fetch(runner.launch(batch))
      times.append(clock() - start)
    seconds = statistics.median(times[1:])
    alone = alone or seconds
    scheduler.pace.model.observe(
      step_time.load_of(chunks), seconds / scheduler.config.num_stages
    )
  return alone


class _Kind(NamedTuple):
  """A batch of decodes of one context, and a chunk of a prefill."""

  num_decodes: int
  context: int
  chunk: int
  start: int


def _kinds(config: config_lib.SchedulerConfig) -> Iterator[_Kind]:
  """Yields the batches to try, which fit the cache; a single decode first."""
  num_places = config.num_pages // len(config.windows)
  room = num_places * config.page_size
  longest = config.max_model_len - 1

  def fit(num_decodes: int, context: int, chunk: int, start: int) -> _Kind:
    chunk = min(chunk, longest)
    start = min(start, longest - chunk)
    places = num_places - -(-(start + chunk) // config.page_size)
    each = places // max(num_decodes, 1) * config.page_size
    return _Kind(
      num_decodes, max(0, min(context, longest, each - 1)), chunk, start
    )

  most = min(config.max_num_seqs, num_places)
  yield fit(1, 1, 0, 0)
  for n in sorted({1, max(1, most // 4), most}):
    for context in (1, longest // 2):
      yield fit(n, context, 0, 0)
  sizes = [n for n in _SIZES if n < config.token_budget]
  for size in (*sizes, config.token_budget):
    for start in (0, longest // 2):
      yield fit(0, 0, min(size, room), start)
    if size > most + 1 and room > 2 * size:
      yield fit(most // 2, longest // 4, size - most // 2, longest // 4)


def _chunks(
  kind: _Kind, config: config_lib.SchedulerConfig
) -> Iterator[types.Chunk]:
  next_page = 0

  def chunk(slot: int, start: int, n: int, is_prefill: bool) -> types.Chunk:
    nonlocal next_page
    num_pages = -(-(start + n) // config.page_size) * len(config.windows)
    # Where windows leave no pages for all tokens, what is read matters not.
    pages = tuple(
      page % config.num_pages
      for page in range(next_page, next_page + num_pages)
    )
    next_page += num_pages
    return types.Chunk(
      request_id=f'warm-up-{slot}',
      slot=slot,
      start=start,
      tokens=(0,) * n,
      num_tokens=n,
      page_table=pages,
      is_prefill=is_prefill,
      samples=True,
      prompt_len=start + n,
      seed=0,
      sampling=_GREEDY,
    )

  for slot in range(kind.num_decodes):
    yield chunk(slot, kind.context, 1, False)
  if kind.chunk:
    slot = min(kind.num_decodes, config.max_num_seqs - 1)
    yield chunk(slot, kind.start, kind.chunk, True)
