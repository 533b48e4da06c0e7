# SPDX-License-Identifier: Apache-2.0
"""Makes the tables of `serve`, for a terminal and for the README.

  python -m sarathi_jax.benchmarks.serve_tables README.md

writes the README's from `results/serve_*_cpu.json`, between two marks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import json
import pathlib
from typing import Any

from absl import app
import rich.table

from sarathi_jax import errors
from sarathi_jax.benchmarks import serve_capacity
from sarathi_jax.benchmarks import servers
from sarathi_jax.benchmarks.serve_capacity import Row
from sarathi_jax.cli import mains
from sarathi_jax.engine import metrics as metrics_lib

RESULTS = pathlib.Path(__file__).parent / 'results'
_BEGIN = '<!-- python -m sarathi_jax.benchmarks.serve_tables README.md -->\n'
_END = '<!-- end -->\n'
_MODELS = ('43m', '150m')
_LATE_S = 0.1  # What a client is at times, even on a quiet machine, is less.
# Groups of servers whose best capacity is told, beside vLLM's.
PACED = f'{servers.OURS}, --tbt_slo_ms'
FIXED = f'{servers.OURS}, fixed budget'


def _ms(seconds: float | None) -> str:
  return '-' if seconds is None else f'{seconds * 1e3:,.0f}'


def _ranged(row: Row, name: str) -> str:
  low, high = row.get('range', {}).get(name, (None, None))
  if row['rounds'] < 2 or low is None:
    return _ms(row[name])
  return f'{_ms(row[name])} ({_ms(low)}-{_ms(high)})'


def line(row: Row) -> str:
  """Returns one run as a line, for people who wait for the next."""
  text = (
    f'{row["side"]}, {row["qps"]:g} QPS: '
    f'{row["output_tokens_per_s"]:.0f} tokens/s, TTFT P50 '
    f'{_ms(row["ttft_p50_s"])} ms, TBT P99 {_ms(row["tbt_p99_s"])} ms'
  )
  if row['num_errors']:
    text += f', {row["num_errors"]} failed: {row["errors"][0]}'
  if row['num_cut']:
    text += f', {row["num_cut"]} of {row["num_requests"]} unfinished'
  if row['client_late_s'] > _LATE_S:
    text += f', sent up to {_ms(row["client_late_s"])} ms too late'
  return text


def points(merged: Sequence[Row]) -> rich.table.Table:
  """Makes a table of latencies by server and rate: a section a server."""
  table = rich.table.Table(
    title='Times in ms; medians (and ranges) over rounds',
    padding=(0, 1, 0, 0),
    caption='A server: its engine, and its token budget or the SLO that this '
    'follows. Of tokens that came in one message all but one have a gap of 0: '
    'tokens/message tells how many did.',
  )
  for name in (
    'server',
    'QPS',
    'tokens/s',
    'TTFT P50',
    'P99',
    'TBT P50',
    'P90',
    'P99',
    'good/s',
    'tokens/\nmessage',
    'failed,\ncut',
  ):
    table.add_column(
      name, justify='left' if name == 'server' else 'right', no_wrap=True
    )
  side = None
  for row in merged:
    if side is not None and row['side'] != side:
      table.add_section()
    first = row['side'] if row['side'] != side else ''
    side = row['side']
    if 'skipped' in row:
      table.add_row(first, f'{row["qps"]:g}', '-', row['skipped'])
      continue
    table.add_row(
      first,
      f'{row["qps"]:g}',
      f'{row["output_tokens_per_s"]:,.0f}',
      _ranged(row, 'ttft_p50_s'),
      _ms(row['ttft_p99_s']),
      _ms(row['tbt_p50_s']),
      _ms(row['tbt_p90_s']),
      _ranged(row, 'tbt_p99_s'),
      '/'.join(f'{v:.3g}' for v in row['goodput_per_s'].values()),
      f'{row["tokens_per_message"]:.2f}',
      f'{row["num_errors"]:g}, {row["num_cut"]:g}',
    )
  return table


def _capacity(found: Mapping[str, Any] | None) -> str:
  if found is None:
    return '-'
  if not found['qps']:
    return f'none at {found["tried"][0]:g} or more'
  return f'{"≥ " if found["is_open"] else ""}{found["qps"]:.3g}'


def ratio(best: Mapping[str, Any], group: str) -> float | None:
  """Returns a group's capacity over vLLM's; None where one is not known."""
  ours, theirs = best.get(group), best.get(servers.VLLM)
  if not ours or not theirs or not theirs['qps'] or theirs['is_open']:
    return None
  return float(ours['qps'] / theirs['qps'])


def capacities(rows: Sequence[Row]) -> rich.table.Table:
  """Makes a table of the largest rates that met each SLO, and who had them."""
  table = rich.table.Table(
    title=f'Capacity, QPS: P50 TTFT <= {rows[0]["ttft_s"]:g} s, and'
  )
  groups = list(dict.fromkeys(g for row in rows for g in row['best']))
  table.add_column('P99 TBT')
  for group in groups:
    table.add_column(group, justify='right', no_wrap=True)
  has_peer = servers.VLLM in groups
  if has_peer:
    for group in groups:
      if group != servers.VLLM:
        table.add_column(f'{group}\n/ {servers.VLLM}', justify='right')
  for row in rows:
    best = row['best']
    cells = [
      _capacity(best.get(g))
      + (f'\n{best[g]["side"].partition(" ")[2]}' if g in best else '')
      for g in groups
    ]
    if has_peer:
      cells += [
        '-' if (r := ratio(best, g)) is None else f'{r:.2f}'
        for g in groups
        if g != servers.VLLM
      ]
    table.add_row(f'<= {row["tbt_s"] * 1e3:.0f} ms, {row["name"]}', *cells)
  return table


def plot(
  path: str, title: str, series: Mapping[str, metrics_lib.Quantiles]
) -> None:
  """Plots how long each part of some times took at most.

  Args:
    path: the file, .png or .svg.
    title: what was measured.
    series: name -> times, seconds.

  Raises:
    ConfigError: there is nothing to show, or the file can't be written.
  """
  from matplotlib import figure

  picture = figure.Figure(figsize=(6.4, 4), layout='constrained')
  axes = picture.subplots()
  axes.set(xlabel='percentile', ylabel='seconds', title=f'{title}, measured')
  axes.set_yscale('log')
  axes.grid(alpha=0.3)
  for name, values in series.items():
    if values.count:
      shown = [values.quantile(i / 100) or 0.0 for i in range(101)]
      axes.plot(shown, label=name)
  if not axes.lines:
    raise errors.ConfigError(f'plot={path!r}: {title}: nothing was answered.')
  axes.legend()
  try:
    picture.savefig(path, dpi=150)
  except (OSError, ValueError) as error:  # such as for .txt
    raise errors.ConfigError(
      f"plot={path!r}: can't be written: {error}."
    ) from error


def _latencies(size: str, runs: Sequence[Row]) -> list[str]:
  """Makes a table of a model's times by rate and server, in Markdown."""
  merged = [row for row in serve_capacity.merge(runs) if 'skipped' not in row]
  sides = list(dict.fromkeys(row['side'] for row in merged))
  cells = {
    (row['qps'], row['side']): f'{_ms(row["ttft_p50_s"])}, '
    f'{_ms(row["tbt_p99_s"])}'
    for row in merged
  }
  return [
    f'| {size}: P50 TTFT, P99 TBT, ms, at requests of | {" | ".join(sides)} |',
    '|' + '---|' * (1 + len(sides)),
    *(
      f'| {qps:g} a second | '
      f'{" | ".join(cells.get((qps, side), "-") for side in sides)} |'
      for qps in sorted({row['qps'] for row in merged})
    ),
  ]


def readme(found: Mapping[str, Mapping[str, Any]]) -> str:
  """Makes the README's tables, in Markdown; empty without results.

  Args:
    found: model -> the JSON of its run.
  """
  if not found:
    return ''
  lines: list[str] = []
  for size, file in found.items():
    results, flags = file['results'], file['flags']
    if not lines:
      version = file['engines'][servers.VLLM]
      lines += [
        f'| Largest rate, requests/s, on {file["machine"]["cores"]} cores | '
        f'sarathi_jax, `--tbt_slo_ms` | vLLM {version}, best of budgets '
        f'{", ".join(flags["vllm_token_budgets"])} | ratio |',
        '|---|---|---|---|',
      ]
    for row in results['capacity']:
      best = row['best']
      over = ratio(best, PACED)
      lines.append(
        f'| {size} Llama, P99 TBT ≤ {row["tbt_s"] * 1e3:.0f} ms '
        f'({row["name"]}) | {_capacity(best.get(PACED))} | '
        f'{_capacity(best.get(servers.VLLM))} | '
        f'{"-" if over is None else f"{over:.2f}"} |'
      )
  for size, file in found.items():
    if runs := file['results']['runs']:
      lines += ['', *_latencies(size, runs)]
  return '\n'.join(lines) + '\n'


def read() -> dict[str, Any]:
  """Reads the results that are there, by model."""
  paths = {size: RESULTS / f'serve_{size}_cpu.json' for size in _MODELS}
  return {
    size: json.loads(path.read_text())
    for size, path in paths.items()
    if path.exists()
  }


def insert(text: str, table: str, mark: str = _BEGIN) -> str:
  """Returns a text with what is between its marks replaced.

  Args:
    text: of the file.
    table: what to put there.
    mark: the line that begins it.

  Raises:
    ConfigError: the text has no marks.
  """
  before, begin, rest = text.partition(mark)
  _, end, after = rest.partition(_END)
  if not begin or not end:
    raise errors.ConfigError(f'no {mark.strip()} and {_END.strip()}')
  table = f'\n{table}\n' if table else '\n'
  return before + begin + table + end + after


def main(arguments: Sequence[str]) -> None:
  if len(arguments) != 1:
    raise app.UsageError('give one file, README.md')
  path = pathlib.Path(arguments[0])
  path.write_text(insert(path.read_text(), readme(read())))


if __name__ == '__main__':
  mains.run(main, takes_arguments=True)
