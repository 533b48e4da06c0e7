# SPDX-License-Identifier: Apache-2.0
"""Finds the capacity of policies under an SLO: the paper's experiment.

  python -m sarathi_jax.simulator.capacity \
      --config=configs/mistral_7b_a100.py --workload=openchat_sharegpt4 \
      --policy=sarathi,vllm,orca,faster_transformer --slo_tbt_p99=0.1,0.5 \
      --token_budget=512,2048,auto --output=DIR

Finds for each policy, budget and SLO the largest rate with a P99 time between
tokens within the SLO and a median scheduling delay within 2 s, on a simulated
deployment; with --target=grpc://HOST:PORT, on the server that runs there,
whose policy and budget are its own. --output keeps capacity.json and plots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent import futures
import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
import pathlib
import sys
from typing import Any

from absl import flags
import rich.console
import rich.progress
import rich.table

from sarathi_jax import config as config_lib
from sarathi_jax import errors
from sarathi_jax.cli import mains
from sarathi_jax.simulator import probe as probe_lib
from sarathi_jax.simulator import scenario as scenario_lib
from sarathi_jax.simulator import search

FLAGS = flags.FLAGS


def define_flags() -> None:
  scenario_lib.define_flags()
  flags.DEFINE_list(
    'policy',
    ['sarathi'],
    'Scheduling policies to compare: '
    'sarathi, vllm, orca, faster_transformer; hybrid_only and '
    'chunked_only are half of sarathi each.',
  )
  flags.DEFINE_list(
    'token_budget',
    None,
    'Token budgets to compare, for '
    'policies that have one: numbers, or auto, which follows '
    "the SLO. Default: --config's.",
  )
  flags.DEFINE_list(
    'slo_tbt_p99',
    None,
    'SLOs to compare: the most that the '
    'P99 time between tokens may be, seconds.',
  )
  flags.DEFINE_list(
    'compare_prefix_cache',
    None,
    'Prefix caches to compare: on, off. Default: as --prefix_cache says.',
  )
  flags.DEFINE_float(
    'slo_delay_p50',
    2.0,
    'The most that the median scheduling delay may be, seconds.',
  )
  flags.DEFINE_float(
    'precision',
    0.02,
    'Relative precision of the capacity: a '
    'rate this much above it does not hold.',
  )
  flags.DEFINE_float(
    'start_qps',
    None,
    'Requests per second at which to begin the search. Default: an estimate.',
  )
  flags.DEFINE_integer(
    'jobs', None, 'Processes that simulate at once. Default: as many as cores.'
  )
  flags.DEFINE_string(
    'target',
    None,
    'grpc://HOST:PORT of a live server whose '
    "capacity to search for, in place of a simulated one's.",
  )
  flags.DEFINE_string(
    'output', None, 'Folder to write capacity.json and plots to.'
  )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
  """One search for a capacity.

  Attributes:
    scenario: what is simulated; None for a live server.
    config, workload: names for people.
    policy: the scheduling policy.
    token_budget: a number, 'auto', or None for policies without one.
    slo: what must hold.
    prefix_cache: whether there is one; None where it is not compared.
  """

  scenario: scenario_lib.Scenario | None
  config: str
  workload: str
  policy: str
  token_budget: int | str | None
  slo: search.Slo
  prefix_cache: bool | None = None

  @property
  def label(self) -> str:
    budget = '' if self.token_budget is None else f' {self.token_budget}'
    cache = {None: '', True: ', cache', False: ', no cache'}[self.prefix_cache]
    return f'{self.policy}{budget}{cache}'

  def result(self, found: search.Capacity) -> dict[str, Any]:
    """Returns a line of capacity.json; times are None where no rate held."""
    best = found.best
    return {
      'config': self.config,
      'workload': self.workload,
      'policy': self.policy,
      'token_budget': self.token_budget,
      'slo_tbt_p99_s': self.slo.p99_tbt_s,
      'capacity_qps': found.qps,
      **{
        name: getattr(best, name, None)
        for name in (
          'p99_tbt_s',
          'p50_ttft_s',
          'p50_scheduling_delay_s',
          'found',
        )
      },
      'prefix_cache': self.prefix_cache,
    }


def rows_of(
  base: scenario_lib.Scenario,
  policies: Sequence[str],
  budgets: Sequence[int | str | None],
  slos: Sequence[search.Slo],
  caches: Sequence[bool | None] = (None,),
) -> list[Row]:
  """Makes a row of every combination; of budgets only if a policy has one.

  Args:
    base: what is simulated, but for the rest.
    policies, budgets, slos: to compare.
    caches: whether there is a prefix cache; None: as `base` has it.
  """
  rows = []
  for policy, slo, cache in itertools.product(policies, slos, caches):
    of_policy = budgets if scenario_lib.has_budget(policy) else [None]
    for budget in of_policy:
      config_lib.check(
        budget != 'auto' or policy == 'sarathi',
        'token_budget',
        budget,
        f'policy={policy!r} has no budget that follows the SLO',
      )
      scenario = base.with_policy(policy, budget, slo.p99_tbt_s)
      if cache is not None:
        scenario = scenario.with_prefix_cache(cache)
      shown = (
        scenario.config.token_budget
        if (budget is None and scenario_lib.has_budget(policy))
        else budget
      )
      rows.append(
        Row(
          scenario=scenario,
          config=base.name,
          workload=pathlib.Path(base.workload.source).stem,
          policy=policy,
          token_budget=shown,
          slo=slo,
          prefix_cache=cache,
        )
      )
  return rows


def search_rows(
  rows: Sequence[Row],
  *,
  precision: float,
  jobs: int,
  start_qps: float | None = None,
  on_done: Callable[[int], None] = lambda num_points: None,
) -> list[search.Capacity]:
  """Searches rows at once, each probe in a process of its own.

  Args:
    rows: rows that have scenarios.
    precision: see `search.find`.
    jobs: processes; those that rows don't need try more rates at once.
    start_qps: where to begin, requests a second; None for an estimate.
    on_done: told 1 for each probe that is done, 0 for each row.

  Raises:
    ConfigError: a row can't be simulated; raised before any is begun.
  """
  for row in rows:
    assert row.scenario is not None
    probe_lib.check(row.scenario, row.slo)
  width = max(1, jobs // len(rows))
  # Not forked: this process may have threads.
  context = multiprocessing.get_context('spawn')
  with (
    futures.ProcessPoolExecutor(jobs, mp_context=context) as processes,
    futures.ThreadPoolExecutor(len(rows)) as threads,
  ):

    def find(row: Row) -> search.Capacity:
      scenario = row.scenario
      assert scenario is not None

      def probe(rates: Sequence[float]) -> list[search.Point]:
        points = []
        for point in processes.map(
          functools.partial(probe_lib.run, scenario, row.slo), rates
        ):
          points.append(point)
          on_done(1)
        return points

      found = search.find(
        probe,
        start_qps or probe_lib.start_qps(scenario),
        width=width,
        precision=precision,
      )
      on_done(0)
      return found

    return list(threads.map(find, rows))


def _slos() -> list[search.Slo]:
  try:
    values = [float(text) for text in FLAGS.slo_tbt_p99 or []]
  except ValueError as error:
    raise errors.ConfigError(
      f'slo_tbt_p99={FLAGS.slo_tbt_p99}: must be seconds.'
    ) from error
  config_lib.check(
    bool(values), 'slo_tbt_p99', FLAGS.slo_tbt_p99, 'must be given, seconds'
  )
  return [
    search.Slo(p99_tbt_s=v, p50_delay_s=FLAGS.slo_delay_p50) for v in values
  ]


def _caches() -> list[bool | None]:
  known = {'on': True, 'off': False}
  for text in FLAGS.compare_prefix_cache or ():
    config_lib.check(
      text in known, 'compare_prefix_cache', text, 'must be on or off'
    )
  return [known[text] for text in FLAGS.compare_prefix_cache or ()] or [None]


def _simulated(
  console: rich.console.Console,
) -> tuple[list[Row], list[search.Capacity]]:
  rows = rows_of(
    scenario_lib.from_flags(),
    FLAGS.policy,
    [scenario_lib.budget_of(text) for text in FLAGS.token_budget or [None]],
    _slos(),
    _caches(),
  )
  with rich.progress.Progress(
    rich.progress.TextColumn('{task.description}'),
    rich.progress.BarColumn(),
    rich.progress.MofNCompleteColumn(),
    rich.progress.TextColumn('{task.fields[probes]} simulations'),
    rich.progress.TimeElapsedColumn(),
    console=console,
    transient=True,
  ) as progress:
    task = progress.add_task('Searching', total=len(rows), probes=0)
    probes = itertools.count(1)

    def on_done(num_points: int) -> None:
      if num_points:
        progress.update(task, probes=next(probes))
      else:
        progress.advance(task)

    return rows, search_rows(
      rows,
      precision=FLAGS.precision,
      start_qps=FLAGS.start_qps,
      jobs=FLAGS.jobs or os.cpu_count() or 1,
      on_done=on_done,
    )


def _seconds(value: float | None) -> str:
  return '-' if value is None else f'{value:.3g} s'


def show(
  console: rich.console.Console,
  rows: Sequence[Row],
  found: Sequence[search.Capacity],
) -> None:
  """Prints a table of what was found."""
  table = rich.table.Table(
    'policy',
    'SLO (P99 TBT)',
    'capacity',
    'P99 TBT',
    'P50 TTFT',
    'P50 scheduling delay',
    'found',
    title=f'{rows[0].config}, {rows[0].workload}',
  )
  for row, capacity in zip(rows, found, strict=True):
    best = capacity.best
    table.add_row(
      row.label,
      _seconds(row.slo.p99_tbt_s),
      f'{capacity.qps:.3g} QPS',
      *(
        _seconds(getattr(best, name, None))
        for name in ('p99_tbt_s', 'p50_ttft_s', 'p50_scheduling_delay_s')
      ),
      f'{best.found:.0%}' if best and best.found is not None else '-',
    )
  console.print(table)


def main() -> None:
  console = rich.console.Console(
    highlight=False, width=None if sys.stdout.isatty() else 110
  )
  if FLAGS.target:
    from sarathi_jax.simulator import live

    rows, found = live.search_target(
      console,
      FLAGS.target,
      _slos(),
      scenario_lib.workload_from_flags(**scenario_lib.simulated_fields()),
      start_qps=FLAGS.start_qps,
      precision=FLAGS.precision,
    )
  else:
    rows, found = _simulated(console)
  show(console, rows, found)
  if FLAGS.output:
    folder = pathlib.Path(FLAGS.output)
    folder.mkdir(parents=True, exist_ok=True)
    results = [r.result(f) for r, f in zip(rows, found, strict=True)]
    (folder / 'capacity.json').write_text(json.dumps(results, indent=1) + '\n')
    from sarathi_jax.simulator import plots

    plots.save_all(folder, rows, found)
    console.print(f'{folder}: {", ".join(sorted(os.listdir(folder)))}')


if __name__ == '__main__':
  mains.run(main, define_flags)
