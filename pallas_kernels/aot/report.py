# SPDX-License-Identifier: Apache-2.0
"""Shows results as tables and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import json
from typing import Any

import jax
import rich.box
import rich.table

from pallas_kernels import gpu_targets
from pallas_kernels.aot import cases as cases_lib
from pallas_kernels.aot import collectives


def as_json(results: Sequence[cases_lib.Result], device: str) -> str:
  """Returns all that is known of the results, as JSON text."""
  return (
    json.dumps(
      {
        'device': device,
        'jax': jax.__version__,
        'cases': [case_dict(result) for result in results],
      },
      indent=1,
    )
    + '\n'
  )


def case_dict(result: cases_lib.Result) -> dict[str, Any]:
  """Returns a result as values that JSON can hold."""
  return {
    'name': result.name,
    'seconds': round(result.seconds, 2),
    'problems': list(result.problems),
    'warnings': list(result.warnings),
    'graphs': result.graphs,
    'outside_graphs': list(result.outside_graphs),
    'kernels': [dataclasses.asdict(kernel) for kernel in result.kernels],
  }


def kernels_table(
  results: Sequence[cases_lib.Result], device: str
) -> rich.table.Table:
  """Returns a table of the resources that the kernels take."""
  table = rich.table.Table(
    'case',
    title=f'{gpu_targets.get(device).device_kind}, JAX {jax.__version__}',
    box=rich.box.SIMPLE_HEAD,
    padding=(0, 1, 0, 0),
  )
  table.add_column('kernel', no_wrap=True)
  for column in (
    'regis-\nters',
    'spill\nbytes',
    'shared\nmemory',
    'CTAs\nper SM',
    's',
  ):
    table.add_column(column, justify='right', no_wrap=True, min_width=6)
  for result in results:
    case, seconds = result.name, f'{result.seconds:.1f}'
    for kernel in result.kernels:
      if kernel.is_ours or kernel.spill_bytes:
        table.add_row(
          case,
          kernel.name,
          str(kernel.registers),
          f'{kernel.spill_bytes:,}',
          f'{kernel.shared_memory:,}',
          str(kernel.blocks_per_sm),
          seconds,
          style='red' if kernel.spill_bytes else None,
        )
        case = seconds = ''
    if case:  # Nothing of it was compiled.
      table.add_row(case, *'-----', seconds, style='red')
  return table


def sent_table(
  sent: Sequence[collectives.Collective], least: int
) -> rich.table.Table:
  """Returns a table of what a device receives from others in a step.

  Args:
    sent: what it receives.
    least: bytes, the least that it could.
  """
  table = rich.table.Table('sent in a step', box=rich.box.SIMPLE_HEAD)
  for column in ('calls', 'MiB'):
    table.add_column(column, justify='right')
  for one in sent:
    table.add_row(one.kind, str(one.count), f'{one.num_bytes / 2**20:,.2f}')
  table.add_row('sums and hops, at least', '', f'{least / 2**20:,.2f}')
  return table
