# SPDX-License-Identifier: Apache-2.0
"""Results as tables and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import dataclasses
import json

import jax
import rich.box
import rich.table

from pallas_kernels import gpu_targets
from pallas_kernels.aot import cases as cases_lib


def tables(results: Sequence[cases_lib.Result],
           device: str) -> Iterator[rich.table.Table]:
  """What the kernels take, and the memory of each step."""
  yield _kernels(results, device)
  for r in results:
    if r.memory:
      table = _memory(r.memory)
      table.caption = (f'{table.caption}; {r.graphs} CUDA graphs, '
                       f'{len(r.outside_graphs)} launches in none')
      yield table


def as_json(results: Sequence[cases_lib.Result], device: str) -> str:
  """All that is known of the results."""
  cases = [{
    'name': r.name, 'seconds': round(r.seconds, 2),
    'problems': list(r.problems), 'warnings': list(r.warnings),
    'graphs': r.graphs, 'outside_graphs': list(r.outside_graphs),
    'kernels': [dataclasses.asdict(k) for k in r.kernels],
    'memory': r.memory and dataclasses.asdict(r.memory)} for r in results]
  return json.dumps({'device': device, 'jax': jax.__version__,
                     'cases': cases}, indent=1) + '\n'


def _kernels(results: Sequence[cases_lib.Result],
             device: str) -> rich.table.Table:
  table = rich.table.Table(
    'case', title=f'{gpu_targets.get(device).device_kind}, '
    f'JAX {jax.__version__}', box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
  table.add_column('kernel', no_wrap=True)
  for column in ('regis-\nters', 'spill\nbytes', 'shared\nmemory',
                 'CTAs\nper SM', 's'):
    table.add_column(column, justify='right', no_wrap=True)
  for result in results:
    case, seconds = result.name, f'{result.seconds:.1f}'
    for kernel in result.kernels:
      if kernel.is_ours or kernel.spill_bytes:
        table.add_row(
          case, kernel.name, str(kernel.registers), f'{kernel.spill_bytes:,}',
          f'{kernel.shared_memory:,}', str(kernel.blocks_per_sm), seconds,
          style='red' if kernel.spill_bytes else None)
        case = seconds = ''
    if case:  # Nothing of it was compiled.
      table.add_row(case, *'-----', seconds, style='red')
  return table


def _memory(memory: cases_lib.Memory) -> rich.table.Table:
  table = rich.table.Table('memory', box=rich.box.SIMPLE_HEAD)
  for column in ('bytes', 'GiB'):
    table.add_column(column, justify='right')
  rows = dataclasses.asdict(memory)
  tokens = rows.pop('kv_tokens')
  for name, size in rows.items():
    table.add_row(name.replace('_', ' '), f'{size:,}', f'{size / 2**30:.2f}')
  table.caption = f'{tokens:,} tokens of KV cache'
  return table
