# SPDX-License-Identifier: Apache-2.0
"""A runner whose time is virtual, and the clock that goes with it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
import itertools
import random
from typing import Any, NamedTuple, Protocol

from sarathi_jax import types
from sarathi_jax.scheduler import step_time


class StepCost(Protocol):
  """How long steps take."""

  pp: int  # pipeline stages

  @property
  def lockstep(self) -> bool:
    """Whether stages go in lockstep; see `cost_model.Host`."""

  def step_seconds(self, chunks: Iterable[types.Chunk]) -> Sequence[float]:
    """Predicts what each stage takes for a batch."""

  def num_rows(self, num_tokens: int) -> int:
    """Returns the rows computed for a batch of tokens, padding included."""


class FittedCost:
  """Steps that take what a model predicts that was fitted to measured steps.

  They vary as those did: each by the factor of one drawn from the measured
  steps of as many rows, with chunks or without.

  Args:
    model: predicts the steps of one device; it is not changed.
  """

  pp = 1
  lockstep = False

  def __init__(self, model: step_time.StepTimeModel) -> None:
    self._model = model
    self._random = random.Random(0)
    self._factors: dict[tuple[int, bool], list[float]] = {}
    for load, seconds in model.recent:
      if (predicted := model.predict(load)) > 0:
        self._factors.setdefault(self._kind(load), []).append(
          seconds / predicted
        )

  def _kind(self, load: step_time.Load) -> tuple[int, bool]:
    tokens, _, _, pairs = load
    return self._model.num_rows(tokens), pairs > 0

  def step_seconds(self, chunks: Iterable[types.Chunk]) -> Sequence[float]:
    load = step_time.load_of(chunks)
    factors = self._factors.get(self._kind(load), (1.0,))
    return [max(self._model.predict(load), 0.0) * self._random.choice(factors)]

  def num_rows(self, num_tokens: int) -> int:
    return self._model.num_rows(num_tokens)


class Clock:
  """A clock of seconds, which moves only when it is told to."""

  def __init__(self) -> None:
    self.now = 0.0

  def __call__(self) -> float:
    return self.now

  def advance_to(self, time: float) -> None:
    """Moves on to a time; never back."""
    self.now = max(self.now, time)


class Span(NamedTuple):
  """The time in which a stage computed a batch, seconds."""

  stage: int
  start: float
  end: float
  batch: types.ScheduledBatch


class Pending(NamedTuple):
  """A batch on its way through the stages.

  `done_at` is None in lockstep, where what comes after it counts, too.
  """

  done_at: float | None
  last_tick: int
  chunks: tuple[types.Chunk, ...]


class SimulatedRunner:
  """An `engine.Runner` that computes nothing and takes as long as a device.

  Each stage takes batches in their order, one at a time, and a batch's hidden
  states go from stage to stage: a pipeline, whose bubbles are seen where
  batches differ. In lockstep all stages begin together, as in one program.

  Args:
    cost: predicts what a batch takes.
    clock: the engine's clock, which this moves.
    on_span: told what each stage does, for a trace.
  """

  def __init__(
    self,
    cost: StepCost,
    clock: Clock,
    on_span: Callable[[Span], None] | None = None,
  ) -> None:
    self._cost = cost
    self._clock = clock
    self._on_span = on_span
    self._lockstep = cost.lockstep and cost.pp > 1
    self._free_at = [0.0] * cost.pp
    self.busy_s = [0.0] * cost.pp
    self._is_warm = False
    # In lockstep: what is in each stage, and when ticks ended.
    self._stages: deque[tuple[types.ScheduledBatch, Sequence[float]] | None] = (
      deque([None] * cost.pp, cost.pp)
    )
    self._ends: list[float] = []

  def reset(self) -> None:
    """Forgets what was done to warm up."""
    self.busy_s = [0.0] * self._cost.pp
    self._is_warm = True

  def launch(self, batch: types.ScheduledBatch) -> Pending:
    ready = self._clock.now
    costs = self._cost.step_seconds(batch.chunks)
    if self._lockstep:
      self._tick((batch, costs))
      return Pending(None, len(self._ends) + self._cost.pp - 2, batch.samplers)
    for stage, seconds in enumerate(costs):
      start = max(ready, self._free_at[stage])
      ready = start + seconds
      self._spend(stage, start, ready, batch)
    return Pending(ready, 0, batch.samplers)

  def _tick(
    self,
    entering: tuple[types.ScheduledBatch, Sequence[float]] | None,
  ) -> None:
    """Moves all stages at once: a batch enters, and the others go on by one."""
    self._stages.appendleft(entering)
    start = max(self._clock.now, self._ends[-1] if self._ends else 0.0)
    longest = 0.0
    for stage, held in enumerate(self._stages):
      if held is not None:
        batch, costs = held
        self._spend(stage, start, start + costs[stage], batch)
        longest = max(longest, costs[stage])
    self._ends.append(start + longest)

  def _spend(
    self, stage: int, start: float, end: float, batch: types.ScheduledBatch
  ) -> None:
    self._free_at[stage] = end
    self.busy_s[stage] += end - start
    if self._on_span is not None and self._is_warm:
      self._on_span(Span(stage, start, end, batch))

  def fetch(self, pending: Pending) -> types.Sampled:
    done_at = pending.done_at
    if done_at is None:
      while len(self._ends) <= pending.last_tick:
        self._tick(None)
      done_at = self._ends[pending.last_tick]
    self._clock.advance_to(done_at)
    return types.Sampled.of(
      pending.chunks, itertools.repeat(0), itertools.repeat(0.0)
    )

  def mask(self, pending: Any, masks: Any) -> None:
    """Does nothing: no output has a grammar here."""

  def num_rows(self, num_tokens: int) -> int:
    return self._cost.num_rows(num_tokens)

  def recover(self) -> None:
    """Does nothing: there is nothing to make anew."""
