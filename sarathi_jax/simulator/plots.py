# SPDX-License-Identifier: Apache-2.0
"""Plots capacities and latencies, each as PNG and SVG."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import dataclasses
import functools
import pathlib
from typing import TYPE_CHECKING

from matplotlib import figure

from sarathi_jax.simulator import search
from sarathi_jax.simulator import simulate
from sarathi_jax.simulator import workload as workload_lib

if TYPE_CHECKING:
  from sarathi_jax.simulator import capacity

# For the stall timeline: the rate, as a fraction of the best capacity, and the
# number of requests that are looked at.
_TIMELINE_LOAD = 0.9
_TIMELINE_REQUESTS = 192


def save_all(
  folder: pathlib.Path,
  rows: Sequence[capacity.Row],
  found: Sequence[search.Capacity],
) -> None:
  """Writes into a folder every plot that has something to show."""
  _save(capacity_bars(rows, found), folder, 'capacity')
  _save(against_qps(rows, found, 'p99_tbt_s', 'P99 TBT, s'), folder, 'tbt')
  _save(against_qps(rows, found, 'p50_ttft_s', 'P50 TTFT, s'), folder, 'ttft')
  if all(row.scenario is not None for row in rows):
    _save(stall_timeline(rows, found), folder, 'stalls')


def _save(plot: figure.Figure, folder: pathlib.Path, name: str) -> None:
  has_any = bool(plot.axes[0].get_legend_handles_labels()[0])
  for kind in ('png', 'svg'):
    path = folder / f'{name}.{kind}'
    if has_any:
      plot.savefig(path, dpi=150, bbox_inches='tight')
    else:
      path.unlink(missing_ok=True)  # Of a run before, which it is not of.


def _figure(x: str, y: str, title: str) -> figure.Figure:
  plot = figure.Figure(figsize=(6.4, 4), layout='constrained')
  axes = plot.subplots()
  axes.set(xlabel=x, ylabel=y, title=title)
  axes.grid(alpha=0.3)
  return plot


def _title(rows: Sequence[capacity.Row]) -> str:
  how = 'measured' if rows[0].scenario is None else 'simulated'
  return f'{rows[0].config}, {rows[0].workload}, {how}'


def _legend(plot: figure.Figure) -> None:
  if plot.axes[0].get_legend_handles_labels()[0]:
    plot.axes[0].legend(title='policy', fontsize=7)


def capacity_bars(
  rows: Sequence[capacity.Row], found: Sequence[search.Capacity]
) -> figure.Figure:
  """Plots the capacity of each policy, by SLO (the paper's figure 10)."""
  plot = _figure('', 'capacity, QPS', _title(rows))
  axes = plot.axes[0]
  slos = sorted({row.slo.p99_tbt_s for row in rows})
  labels = list(dict.fromkeys(row.label for row in rows))
  width = 0.8 / len(labels)
  for i, label in enumerate(labels):
    bars = [
      (
        slos.index(row.slo.p99_tbt_s) + (i - (len(labels) - 1) / 2) * width,
        c.qps,
      )
      for row, c in zip(rows, found, strict=True)
      if row.label == label
    ]
    drawn = axes.bar(
      [x for x, _ in bars], [q for _, q in bars], width, label=label
    )
    axes.bar_label(drawn, fmt='%.2f', fontsize=7)
  axes.set_xticks(range(len(slos)), [f'P99 TBT ≤ {s:g} s' for s in slos])
  axes.set_ylim(bottom=0)
  _legend(plot)
  return plot


def against_qps(
  rows: Sequence[capacity.Row],
  found: Sequence[search.Capacity],
  field: str,
  what: str,
) -> figure.Figure:
  """Plots a latency over the rates that were tried (the paper's figure 11)."""
  plot = _figure('QPS', what, _title(rows))
  axes = plot.axes[0]
  for row, c in zip(rows, found, strict=True):
    seen = [p for p in c.points if getattr(p, field) > 0]
    if not seen:
      continue
    axes.plot(
      [p.qps for p in seen],
      [getattr(p, field) for p in seen],
      '.-',
      label=f'{row.label}, SLO {row.slo.p99_tbt_s:g} s',
    )
  if field == 'p99_tbt_s':
    for slo in sorted({row.slo.p99_tbt_s for row in rows}):
      axes.axhline(slo, color='k', ls=':', lw=0.8)
  axes.set_yscale('log')
  _legend(plot)
  return plot


def stall_timeline(
  rows: Sequence[capacity.Row], found: Sequence[search.Capacity]
) -> figure.Figure:
  """Plots the tokens of one request as they come (the paper's figure 1a).

  All policies get the same requests at the same rate; the request is the one
  with the longest output that all can be compared by.
  """
  qps = _TIMELINE_LOAD * max(*(c.qps for c in found), 0.01)
  plot = _figure(
    'seconds since the first token',
    'tokens generated',
    f'{_title(rows)}, one request at {qps:.2f} QPS',
  )
  axes = plot.axes[0]
  for label, times in _timelines(rows, qps):
    if not times:
      continue
    axes.step(
      [t - times[0] for t in times],
      range(1, len(times) + 1),
      where='post',
      label=label,
    )
  _legend(plot)
  return plot


def _timelines(
  rows: Sequence[capacity.Row], qps: float
) -> Iterator[tuple[str, list[float]]]:
  """Yields (label, when each token came) of each policy and budget."""
  for row in {row.label: row for row in rows}.values():
    assert row.scenario is not None
    config = row.scenario.workload
    workload = workload_lib.make(
      dataclasses.replace(
        config,
        num_requests=min(_TIMELINE_REQUESTS, len(workload_lib.make(config))),
      )
    ).at_rate(qps)
    half = len(workload) // 2
    watched = int(workload.output_lens[: max(half, 1)].argmax())
    times: list[float] = []
    simulate.simulate(
      row.scenario.cost(),
      row.scenario.config,
      workload,
      on_token=functools.partial(_note, times, watched),
    )
    yield row.label, times


def _note(times: list[float], watched: int, request: int, now: float) -> None:
  if request == watched:
    times.append(now)
