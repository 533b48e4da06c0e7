# SPDX-License-Identifier: Apache-2.0
"""Makes the runs of `serve`: which server, at which rate, in which order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
import contextlib
import dataclasses
import math
import random
import time
from typing import Any, Protocol

import rich.console
import rich.progress

from sarathi_jax.benchmarks import common
from sarathi_jax.benchmarks import journal as journal_lib
from sarathi_jax.benchmarks import serve_capacity
from sarathi_jax.benchmarks import serve_tables
from sarathi_jax.simulator import open_loop
from sarathi_jax.simulator import workload as workload_lib

# Seconds that a server takes to start and to warm up, for the estimate.
_START_S, _WARM_UP_S = 30.0, 5.0
_OVER = 1.1  # What a run takes, of the time in which requests come.
_PAUSE_S = 1.0  # after a run, for what was cut to be gone


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Load:
  """What servers are asked.

  Attributes:
    config: the workload's; its seed is the first round's.
    rates: requests a second, ascending.
    seconds: how long requests come.
    drain_s: seconds that requests may go on after that.
    rounds: number of turns that each server has.
    refine: number of rates to try between, for each SLO of a server.
    vocab_size: the prompts' token ids are below it.
  """

  config: workload_lib.WorkloadConfig
  rates: tuple[float, ...]
  seconds: float
  drain_s: float
  rounds: int
  refine: int
  vocab_size: int

  def workload(self, qps: float, round_: int) -> workload_lib.Workload:
    """Makes what comes in `seconds`; ConfigError if a trace has too few."""
    return workload_lib.make(
      dataclasses.replace(
        self.config,
        seed=self.config.seed + round_,
        qps=qps,
        num_requests=max(2, math.ceil(qps * self.seconds)),
      )
    ).at_rate(qps)

  def requests(self, qps: float, round_: int) -> list[open_loop.Request]:
    """Makes the requests, which are the same for all servers."""
    return open_loop.requests(
      self.workload(qps, round_), self.vocab_size, self.config.seed + round_
    )

  def burst(
    self, count: int, prompt_len: int, output_len: int, seed: int = 0
  ) -> list[open_loop.Request]:
    """Makes requests that come at once, and are not of the load."""
    rng = random.Random(f'burst {seed}')
    return [
      open_loop.Request(
        0.0,
        [rng.randrange(self.vocab_size) for _ in range(prompt_len)],
        output_len,
      )
      for _ in range(count)
    ]


class Server(Protocol):
  """A server that gets the load."""

  @property
  def target(self) -> open_loop.Target:
    """The target that the client asks."""

  def check(self) -> None:
    """Raises PeerError if it has ended."""


@dataclasses.dataclass(frozen=True, slots=True)
class Given:
  """A server that runs without us."""

  target: open_loop.Target

  def check(self) -> None:
    """Does nothing: the server is not ours to look after."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
  """A server that has turns.

  Attributes:
    name: its name, for people.
    slos: the SLOs under which to look for its capacity.
    start: has it run, from when it answers to the end of the block.
  """

  name: str
  slos: tuple[serve_capacity.Slo, ...]
  start: Callable[[], contextlib.AbstractContextManager[Server]]


def run(
  target: open_loop.Target,
  asked: Sequence[open_loop.Request],
  limit_s: float = math.inf,
  on_look: Callable[[open_loop.Seen], None] = lambda seen: None,
) -> open_loop.Seen:
  """Calls `open_loop.run` in an event loop of its own."""

  def look(seen: open_loop.Seen) -> bool:
    on_look(seen)
    return False

  return asyncio.run(
    open_loop.run(target, asked, limit_s=limit_s, stop_when=look)
  )


class Runs:
  """Goes through rounds, servers and rates, and keeps what each run says.

  Args:
    journal: keeps rows; what it has is not run again.
    console: gets a line for each run.
    progress: shows what is under way, by the time that it takes.

  Attributes:
    journal, console: see above.
    last: the last run's name, and what it saw; None before any.
  """

  def __init__(
    self,
    journal: journal_lib.Journal,
    console: rich.console.Console,
    progress: rich.progress.Progress,
  ) -> None:
    self.journal = journal
    self.console = console
    self._progress = progress
    self._task = progress.add_task('', total=None)
    self._settled_s = 0.0
    self.last: tuple[str, open_loop.Seen] | None = None

  def say(self, what: str) -> None:
    """Shows what is under way."""
    self._progress.update(self._task, description=what)

  def announce(
    self,
    load: Load,
    num_slos: Sequence[int],
    num_started: int,
  ) -> None:
    """Announces how long all will take.

    Args:
      load: what is run.
      num_slos: number of SLOs of each server that has turns.
      num_started: servers that are started before.
    """
    self.turn_s = _START_S + _WARM_UP_S if num_started else _WARM_UP_S
    self.run_s = load.seconds * _OVER + _PAUSE_S
    num_runs = sum(len(load.rates) + load.refine * slos for slos in num_slos)
    total = num_started * self.turn_s + load.rounds * (
      len(num_slos) * self.turn_s + num_runs * self.run_s
    )
    self._progress.update(self._task, total=total)
    done = sum('side' in row for row in self.journal.rows.values())
    self.console.print(
      f'{_count(len(num_slos), "server")}, {_count(load.rounds, "round")}, '
      f'at most {_count(num_runs * load.rounds, "run")} of {load.seconds:g} s,'
      f' {done} of them done: about {_time(total - done * self.run_s)}.'
      + (
        f' Kept in {self.journal.path}: the same command goes on after an '
        'interruption.'
        if num_started
        else ''
      )
    )

  def tick(self) -> None:
    """Notes that a second is over."""
    self._progress.advance(self._task, 1.0)

  def settle(self, seconds: float) -> None:
    """Notes that what was to take so many seconds is done, or need not be."""
    self._settled_s += seconds
    self._progress.update(self._task, completed=self._settled_s)

  def go(
    self,
    load: Load,
    slos: Sequence[serve_capacity.Slo],
    contenders: Sequence[Contender],
    groups: Mapping[str, Mapping[str, Sequence[str]]],
  ) -> dict[str, Any]:
    """Runs all rounds.

    Args:
      load: what servers are asked.
      slos: what goodput and capacity are of.
      contenders: take turns, in this order.
      groups: see `serve_capacity.capacities`.

    Returns:
      `runs`, `points` (their medians), and `capacity`.

    Raises:
      PeerError: a server ended.
      RequestError: a server can't be reached.
    """
    for round_ in range(load.rounds):
      for contender in contenders:
        _Turn(self, load, slos, contender, round_).go()
    rows = [
      {key: value for key, value in row.items() if key != 'point'}
      for row in self.journal.rows.values()
      if 'side' in row
    ]
    merged = serve_capacity.merge(rows)
    return {
      'runs': rows,
      'points': merged,
      'capacity': serve_capacity.capacities(merged, slos, groups),
    }


class _Turn:
  """One server's runs of one round."""

  def __init__(
    self,
    runs: Runs,
    load: Load,
    slos: Sequence[serve_capacity.Slo],
    contender: Contender,
    round_: int,
  ) -> None:
    self._runs, self._load, self._slos = runs, load, slos
    self._contender, self._round = contender, round_
    self._server: Server | None = None
    self._closing = contextlib.ExitStack()

  def go(self) -> None:
    """Tries all rates; those of later rounds are the first one's."""
    with self._closing:
      if self._round:
        for qps in self._rows(0):
          self._try(qps)
        return
      for qps in self._load.rates:
        row = self._try(qps)
        if 'skipped' not in row and serve_capacity.is_overloaded(
          row, self._slos[0].ttft_s
        ):
          for more in self._load.rates:
            if more > qps:
              self._skip(more, f'overloaded at {qps:g}')
      for slo in self._contender.slos:
        for _ in range(self._load.refine):
          rows = self._rows(0)
          between = serve_capacity.next_rate(
            {q: slo.holds(row) for q, row in rows.items()}
          )
          if between is None or between in rows:
            break
          self._try(between)

  def _rows(self, round_: int) -> dict[float, serve_capacity.Row]:
    """Returns this server's rows of a round so far, by rate, in order."""
    return {
      row['qps']: row
      for row in self._runs.journal.rows.values()
      if (row.get('side'), row.get('round')) == (self._contender.name, round_)
    }

  def _point(self, qps: float) -> str:
    return f'{self._contender.name}, {qps:g} QPS, round {self._round}'

  def _facts(self, qps: float) -> serve_capacity.Row:
    return {'side': self._contender.name, 'qps': qps, 'round': self._round}

  def _skip(self, qps: float, why: str) -> None:
    if self._point(qps) not in self._runs.journal:
      self._runs.journal.add(
        self._point(qps), {**self._facts(qps), 'skipped': why}
      )
      self._runs.settle(self._runs.run_s)

  def _try(self, qps: float) -> serve_capacity.Row:
    """Returns the row of a rate; measures it unless it is there."""
    point, journal = self._point(qps), self._runs.journal
    if self._round and 'skipped' in (first := self._rows(0)[qps]):
      self._skip(qps, first['skipped'])
    if point not in journal:
      server = self._running()
      seen = self._run(server, qps)
      self._runs.last = point, seen
      server.check()
      row = self._facts(qps) | serve_capacity.make_row(seen, self._slos)
      journal.add(point, row)
      self._runs.console.print(serve_tables.line(row))
    self._runs.settle(self._runs.run_s)
    return journal.rows[point]

  def _running(self) -> Server:
    """Returns the server, started and warm."""
    if self._server is None:
      self._runs.say(f'Starting {self._contender.name}')
      self._server = self._closing.enter_context(self._contender.start())
      self._runs.say(f'{self._contender.name}: warming up')
      for count in (1, 8, 2):
        seen = run(self._server.target, self._load.burst(count, 64, 16))
        if seen.errors:
          raise common.PeerError(f'{self._contender.name}: {seen.errors[0]}')
      self._runs.settle(self._runs.turn_s)
    return self._server

  def _run(self, server: Server, qps: float) -> open_loop.Seen:
    asked = self._load.requests(qps, self._round)
    what = (
      f'round {self._round + 1} of {self._load.rounds}, '
      f'{self._contender.name}, {qps:g} QPS'
    )

    def show(seen: open_loop.Seen) -> None:
      self._runs.tick()
      done = sum(
        o.e2e_s is not None and len(o.token_ids) == r.max_tokens
        for o, r in zip(seen.outcomes, asked, strict=True)
      )
      self._runs.say(f'{what}: {done} of {len(asked)} requests')

    self._runs.say(what)
    seen = run(
      server.target, asked, self._load.seconds + self._load.drain_s, show
    )
    time.sleep(_PAUSE_S)
    return seen


def _count(number: int, what: str) -> str:
  return f'{number} {what}{"s" * (number != 1)}'


def _time(seconds: float) -> str:
  minutes = max(1, round(seconds / 60))
  return (
    f'{minutes // 60} h {minutes % 60} min'
    if minutes >= 60
    else f'{minutes} min'
  )
