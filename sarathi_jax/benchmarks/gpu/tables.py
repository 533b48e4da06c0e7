# SPDX-License-Identifier: Apache-2.0
"""Prints what was measured as tables for people."""

from __future__ import annotations

import rich.console

from sarathi_jax.benchmarks import common
from sarathi_jax.benchmarks.gpu import targets

_KERNELS = 12  # of each step; all are in the results
_COLUMNS = 12  # A lone row of more is shown as lines.


def show(console: rich.console.Console, title: str, rows: targets.Rows) -> None:
  """Prints rows; a table for each kind, as these have their columns in common.

  Tests are counted, but for those that failed; kernels get a table a step.
  """
  if title == 'tests':
    console.print(f'tests: {sum("error" not in r for r in rows)} passed')
    rows = [row for row in rows if 'error' in row]
  kinds: dict[tuple[str, ...], targets.Rows] = {}
  for row in rows:
    if 'kernels' in row:
      _table(
        console,
        row['point'],
        [
          {'kernel': name, 'calls': calls, 'us': us}
          for name, calls, us in row['kernels'][:_KERNELS]
        ],
      )
      continue
    short = {k: v for k, v in row.items() if not isinstance(v, list)}
    kinds.setdefault(tuple(short), []).append(short)
  for same in kinds.values():
    _table(console, title, same)


def show_verdicts(
  console: rich.console.Console, verdicts: targets.Verdicts
) -> None:
  """Prints the verdicts, which are to be read first."""
  for name, found in verdicts.comparisons.items():
    show(
      console,
      name.replace('_', ' '),
      found
      if isinstance(found, list)
      else [{'point': k, 'ratio': v} for k, v in found.items()],
    )
  if verdicts.tuned:
    console.print(
      'For tuning.TUNED, if they win by more than the noise:',
      *verdicts.tuned,
      sep='\n  ',
      markup=False,
    )
  show(console, 'targets', verdicts.targets)


def _table(
  console: rich.console.Console, title: str, rows: targets.Rows
) -> None:
  if not rows:
    return
  if len(rows) == 1 and len(rows[0]) > _COLUMNS:
    rows = [{'': name, 'value': value} for name, value in rows[0].items()]
  console.print(common.table(rows, title))
