# SPDX-License-Identifier: Apache-2.0
"""What people see after a run: a table of throughput and latencies."""

from __future__ import annotations

import rich.table

from sarathi_jax.engine import metrics as metrics_lib


def _seconds(value: float | None) -> str:
  if value is None:
    return '-'
  return f'{value * 1e3:.1f} ms' if value < 1 else f'{value:.2f} s'


def summary_table(
  metrics: metrics_lib.EngineMetrics,
  seconds: float,
  num_preemptions: int,
  num_errors: int = 0,
) -> rich.table.Table:
  """Makes a table of throughput, latencies and waste.

  Args:
    metrics: those of the engine that ran.
    seconds: how long it ran.
    num_preemptions: preemptions of all requests.
    num_errors: number of inputs that were refused.
  """
  table = rich.table.Table(show_header=False, box=None, padding=(0, 2, 0, 0))
  table.add_column(style='bold')
  table.add_column()
  seconds = max(seconds, 1e-9)
  rows = [
    ('requests', f'{metrics.num_finished:,} in {_seconds(seconds)}'),
    (
      'output',
      f'{metrics.num_output_tokens:,} tokens, '
      f'{metrics.num_output_tokens / seconds:,.1f} tokens/s',
    ),
    (
      'prompts',
      f'{metrics.num_prompt_tokens:,} tokens, '
      f'{metrics.num_prompt_tokens / seconds:,.1f} tokens/s',
    ),
  ]
  for name, values in (
    ('TTFT', metrics.ttft_s),
    ('TBT', metrics.tbt_s),
    ('scheduling delay', metrics.scheduling_delay_s),
  ):
    rows.append(
      (
        name,
        '  '.join(
          f'P{q} {_seconds(values.quantile(q / 100))}' for q in (50, 90, 99)
        ),
      )
    )
  rows += [
    (
      'steps',
      f'{metrics.num_steps:,}, '
      f'{metrics.padding_waste:.1%} of their rows padding',
    ),
    ('preemptions', f'{num_preemptions:,}'),
  ]
  if num_errors:
    rows.append(('errors', f'[red]{num_errors:,}[/], see the output'))
  for row in rows:
    table.add_row(*row)
  return table
