# SPDX-License-Identifier: Apache-2.0
"""Writes the README's table of what rounding costs, between two marks.

  python -m sarathi_jax.benchmarks.perplexity_table README.md

It is of `results/perplexity_cpu.json`, which `perplexity` wrote.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import json
import pathlib
from typing import Any

from absl import app

from sarathi_jax.benchmarks import perplexity
from sarathi_jax.benchmarks import serve_tables
from sarathi_jax.cli import mains

BEGIN = '<!-- python -m sarathi_jax.benchmarks.perplexity_table README.md -->\n'
_PATH = serve_tables.RESULTS / 'perplexity_cpu.json'


def readme(found: Mapping[str, Any]) -> str:
  """Makes the table, in Markdown, of the JSON of a run."""
  first, *others = found['results']
  base = perplexity.Result(first['num_tokens'], first['loss'])
  names, more = [], []
  for row in others:
    codes, _, group = row['name'].partition(':')
    names.append(f'{codes}, groups of {group}' if group else codes)
    result = perplexity.Result(row['num_tokens'], row['loss'])
    more.append(f'{100 * result.more_than(base):.2f}')
  window = found['flags']['window']
  return '\n'.join(
    (
      'Of the quickstart model, on docstrings that it did not see '
      f'({base.perplexity:.1f};',
      f'{base.num_tokens:,} tokens, windows of {window}, float32 on a CPU), it '
      'grows by:',
      '',
      f'| | {" | ".join(names)} |',
      '|---' * (1 + len(names)) + '|',
      f'| % | {" | ".join(more)} |',
      '',
    )
  )


def read() -> Any:
  """Reads the results."""
  return json.loads(_PATH.read_text())


def main(arguments: Sequence[str]) -> None:
  if len(arguments) != 1:
    raise app.UsageError('give one file, README.md')
  path = pathlib.Path(arguments[0])
  table = readme(read())
  path.write_text(serve_tables.insert(path.read_text(), table, BEGIN))


if __name__ == '__main__':
  mains.run(main, takes_arguments=True)
