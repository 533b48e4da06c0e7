# SPDX-License-Identifier: Apache-2.0
"""Writes README's tables of models: what the converter knows to read, and how
these write calls of tools and what they think.

python -m tests.checkpoints_convert.models_table
"""

from __future__ import annotations

from checkpoints_convert import families
from sarathi_jax.text import reply_formats
from tests import source_tree

FILE = source_tree.ROOT / 'README.md'
_BEGIN, _END = '<!-- {}: ', '<!-- end -->'


def table() -> str:
  """Returns the table's lines."""
  lines = ['| architecture | models |', '|---|---|']
  lines += [
    f'| `{name}` | {family.models} |'
    for name, family in sorted(families.ARCHITECTURES.items())
  ]
  return '\n'.join(lines)


def formats() -> str:
  """Returns the lines of the table of tools and reasoning."""
  lines = ['| flag | value | models |', '|---|---|---|']
  lines += [
    f'| `--{flag}` | `{name}` | {row.models} |'
    for flag, rows in (
      ('tool_parser', reply_formats.TOOLS),
      ('reasoning_parser', reply_formats.REASONING),
    )
    for name, row in rows.items()
  ]
  return '\n'.join(lines)


def readme() -> str:
  """Returns README with the tables as they should be."""
  text = FILE.read_text()
  for name, lines in (('models', table()), ('tools', formats())):
    before, begin, after = text.partition(_BEGIN.format(name))
    assert begin, name
    first, _, rest = after.partition('\n')
    _, end, rest = rest.partition(_END)
    text = f'{before}{begin}{first}\n{lines}\n{end}{rest}'
  return text


def main() -> None:
  FILE.write_text(readme())


if __name__ == '__main__':
  main()
