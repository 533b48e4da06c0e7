# SPDX-License-Identifier: Apache-2.0
"""Shows results as tables and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import json
from typing import Any

import jax
import rich.box
import rich.table

from pallas_kernels import gpu_targets
from pallas_kernels.aot import cases as cases_lib
from pallas_kernels.aot import collectives
from pallas_kernels.aot import estimates

_ESTIMATED = 'issue', 'matrix', 'memory'  # of estimates.Estimate


def as_json(
  results: Sequence[cases_lib.Result],
  device: str,
  loops: Mapping[str, Sequence[estimates.Judged]],
) -> str:
  """Returns all that is known of the results, as JSON text.

  Args:
    results: of the cases.
    device: their device.
    loops: case -> the inner loops of its kernels, where they are known.
  """
  return (
    json.dumps(
      {
        'device': device,
        'jax': jax.__version__,
        'cases': [
          case_dict(result) | {'loops': loop_dicts(loops.get(result.name, ()))}
          for result in results
        ],
      },
      indent=1,
    )
    + '\n'
  )


def loop_dicts(loops: Sequence[estimates.Judged]) -> list[dict[str, Any]]:
  """Returns inner loops as values that JSON can hold."""
  return [
    {**dataclasses.asdict(one), 'bound': one.estimate.bound} for one in loops
  ]


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


def loops_table(
  loops: Mapping[str, Sequence[estimates.Judged]],
) -> rich.table.Table:
  """Returns a table of the inner loops of kernels.

  Args:
    loops: case -> those of its kernels.
  """
  table = rich.table.Table(
    title='A turn of each inner loop: instructions of a warp, estimates in ns',
    caption='Estimated, not measured: the least nanoseconds of a '
    'multiprocessor, for a block, to issue, to multiply matrices (MMA), and to '
    'load, if all comes from memory (in brackets: most is found in the L2 '
    'cache); * is the bound. Wait: groups of loads that may be under way.',
    box=rich.box.SIMPLE_HEAD,
    padding=(0, 1, 0, 0),
    pad_edge=False,
  )
  table.add_column('\nkernel', min_width=len(' attend_chunks'))
  for column in (
    'in-\nstr.',
    '\nMMA',
    'per\nMMA',
    'loads\nx bits',
    '\nwait',
    'est.\nissue',
    'est.\nMMA',
    'est.\nload',
  ):
    table.add_column(column, justify='right', no_wrap=True)
  for name, found in loops.items():
    table.add_row(name, style='bold')
    for judged in found:
      loop = judged.loop
      table.add_row(
        f' {judged.kernel}',
        str(loop.instructions),
        str(loop.matrix or '-'),
        f'{loop.instructions / loop.matrix:.1f}' if loop.matrix else '-',
        ' '.join(f'{count}x{bits}' for bits, count in loop.loads),
        ' '.join(map(str, loop.waits)) or '-',
        *(_nanoseconds(judged.estimate, kind) for kind in _ESTIMATED),
      )
  return table


def _nanoseconds(estimate: estimates.Estimate, kind: str) -> str:
  text = f'{getattr(estimate, kind):,.0f}'
  if kind == 'memory' and estimate.is_shared:
    return f'({text})'
  return text + ('*' if kind == estimate.bound else ' ')


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
