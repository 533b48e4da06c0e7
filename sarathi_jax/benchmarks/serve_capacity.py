# SPDX-License-Identifier: Apache-2.0
"""Makes the runs of `serve` into rows, medians over rounds, and capacities."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import math
import statistics
from typing import Any

from sarathi_jax.simulator import open_loop

Row = dict[str, Any]
_QUANTILES = (0.5, 0.9, 0.99)
# A median TTFT of so many limits, or so large a part of the requests cut: the
# rates above would tell nothing but that, slowly.
_OVERLOAD, _MOST_CUT = 5.0, 0.3
# Rates nearer to each other than this are not told apart, as runs differ.
_PRECISION = 1.06


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
  """Objectives that a rate must meet. Times are seconds.

  Attributes:
    name: its name, for people.
    tbt_s: the most that the 99th percentile of times between tokens is.
    ttft_s: the most that the median time to the first token is.
  """

  name: str
  tbt_s: float
  ttft_s: float

  def holds(self, row: Row) -> bool:
    """Says whether the SLO was met and nothing failed."""
    ttft, tbt = row.get('ttft_p50_s'), row.get('tbt_p99_s')
    return (
      not row.get('num_errors')
      and ttft is not None
      and tbt is not None
      and ttft <= self.ttft_s
      and tbt <= self.tbt_s
    )


def make_row(seen: open_loop.Seen, slos: Sequence[Slo]) -> Row:
  """Makes a row of the numbers of one run.

  Percentiles are None without values. Goodput is requests a second that met an
  SLO's limits, each with its own first token and its own longest gap.
  """
  times = {
    'ttft': seen.quantiles('ttft_s'),
    'tbt': seen.tbt_s,
    'e2e': seen.quantiles('e2e_s'),
  }
  num_done = sum(not o.error and not o.is_cut for o in seen.outcomes)
  return {
    'num_requests': len(seen.outcomes),
    'seconds': seen.seconds,
    'num_errors': sum(bool(o.error) for o in seen.outcomes),
    'errors': seen.errors[:5],
    'num_cut': sum(o.is_cut for o in seen.outcomes),
    'output_tokens_per_s': seen.num_tokens / seen.seconds,
    'requests_per_s': num_done / seen.seconds,
    'tokens_per_message': seen.tokens_per_message,
    'client_late_s': max(o.late_s for o in seen.outcomes),
    'goodput_per_s': {
      slo.name: sum(o.meets(slo.ttft_s, slo.tbt_s) for o in seen.outcomes)
      / seen.seconds
      for slo in slos
    },
    **{
      f'{name}_p{q * 100:g}_s': values.quantile(q)
      for name, values in times.items()
      for q in _QUANTILES
    },
  }


def is_overloaded(row: Row, ttft_s: float) -> bool:
  """Says whether higher rates need not be tried."""
  ttft = row['ttft_p50_s']
  return (
    ttft is None
    or ttft > _OVERLOAD * ttft_s
    or row['num_cut'] > _MOST_CUT * row['num_requests']
  )


def merge(rows: Iterable[Row]) -> list[Row]:
  """Makes a row for each side and rate, with the medians of its rounds.

  It has `rounds`, their number, and `range`, the least and the most of what an
  SLO is about. What was skipped in any round stays so.
  """
  groups: dict[tuple[str, float], list[Row]] = {}
  for row in rows:
    groups.setdefault((row['side'], row['qps']), []).append(row)
  merged = []
  for (side, qps), group in sorted(groups.items(), key=lambda g: g[0][1]):
    skipped = [row for row in group if 'skipped' in row]
    if skipped:
      merged.append(
        {'side': side, 'qps': qps, 'skipped': skipped[0]['skipped']}
      )
      continue
    median: Row = {'side': side, 'qps': qps, 'rounds': len(group)}
    for name in group[0]:
      values = [r[name] for r in group]
      if (
        name not in median
        and name != 'round'
        and all(isinstance(v, float | int | None) for v in values)
      ):
        median[name] = _median(values)
    median['num_errors'] = sum(r['num_errors'] for r in group)
    median['goodput_per_s'] = {
      slo: _median([r['goodput_per_s'][slo] for r in group])
      for slo in group[0]['goodput_per_s']
    }
    median['range'] = {
      name: [min(values), max(values)]
      for name in ('ttft_p50_s', 'tbt_p99_s')
      if None not in (values := [r[name] for r in group])
    }
    merged.append(median)
  order = list(dict.fromkeys(side for side, _ in groups))
  return sorted(merged, key=lambda row: order.index(row['side']))


def _median(values: Sequence[float | None]) -> float | None:
  known = [value for value in values if value is not None]
  return statistics.median(known) if known else None


def next_rate(held: Mapping[float, bool]) -> float | None:
  """Returns the rate that says most about the capacity; None: it is known.

  Args:
    held: rates that were tried -> whether the SLO was met.
  """
  best = max((qps for qps, ok in held.items() if ok), default=None)
  above = min(
    (qps for qps, ok in held.items() if not ok and qps > (best or 0)),
    default=None,
  )
  if best is None or above is None:
    return _round(above / 2 if above else (best or 1) * 1.5)
  if above / best <= _PRECISION:
    return None
  return _round(math.sqrt(best * above))


def _round(qps: float) -> float:
  return float(f'{qps:.3g}')


def capacity(merged: Sequence[Row], side: str, slo: Slo) -> Row:
  """Finds the largest rate of a side at which an SLO held.

  Returns:
    `side`; `qps`, 0 if there was none; `tried`, the least and the most of the
    rates; `is_open`: the largest of them held, so there may be more.
  """
  rows = {row['qps']: row for row in merged if row['side'] == side}
  held = [qps for qps, row in rows.items() if slo.holds(row)]
  return {
    'side': side,
    'qps': max(held, default=0.0),
    'tried': [min(rows), max(rows)],
    'is_open': max(rows) in held,
  }


def capacities(
  merged: Sequence[Row],
  slos: Sequence[Slo],
  groups: Mapping[str, Mapping[str, Sequence[str]]],
) -> list[Row]:
  """Finds the best of each group of sides, under each SLO.

  Args:
    merged: rows of `merge`.
    slos: what must hold.
    groups: SLO's name -> group -> its sides; empty groups are left out.

  Returns:
    A row for each SLO: `slo`, its limits, and `best`: group -> `capacity`.
  """
  return [
    {
      **dataclasses.asdict(slo),
      'best': {
        group: max(
          (capacity(merged, side, slo) for side in sides),
          key=lambda found: found['qps'],
        )
        for group, sides in groups[slo.name].items()
        if sides
      },
    }
    for slo in slos
  ]
