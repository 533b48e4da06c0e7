# SPDX-License-Identifier: Apache-2.0
"""Writes README's table of models: what the converter knows to read.

python -m tests.checkpoints_convert.models_table
"""

from __future__ import annotations

from checkpoints_convert import families
from tests import source_tree

FILE = source_tree.ROOT / 'README.md'
_BEGIN, _END = '<!-- models: ', '<!-- end -->'


def table() -> str:
  """Returns the table's lines."""
  lines = ['| architecture | models |', '|---|---|']
  lines += [
    f'| `{name}` | {family.models} |'
    for name, family in sorted(families.ARCHITECTURES.items())
  ]
  return '\n'.join(lines)


def readme() -> str:
  """Returns README with the table as it should be."""
  before, begin, after = FILE.read_text().partition(_BEGIN)
  first, _, rest = after.partition('\n')
  _, end, rest = rest.partition(_END)
  return f'{before}{begin}{first}\n{table()}\n{end}{rest}'


def main() -> None:
  FILE.write_text(readme())


if __name__ == '__main__':
  main()
