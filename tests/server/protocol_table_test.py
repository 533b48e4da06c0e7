# SPDX-License-Identifier: Apache-2.0
"""PROTOCOLS.md says what becomes of each field over each protocol."""

from __future__ import annotations

from sarathi_jax import sampling_params
from tests import sampling_fields
from tests import source_tree
from tests.server import protocol_table


def test_the_table_is_what_protocols_do() -> None:
  """If not: `python -m tests.server.protocol_table`, and read what is new."""
  assert sampling_fields.EXAMPLES.keys() == sampling_params.FIELDS.keys()
  with protocol_table.served() as served:
    made = protocol_table.table(served)
  assert made.splitlines() == protocol_table.FILE.read_text().splitlines()
  for line in made.splitlines():
    if line.startswith('| `'):  # only smg drops anything
      cells = line.split(' | ')
      others = [*cells[1:7], *cells[9:]]
      assert protocol_table.DROPPED not in others, line


def test_readme_names_it() -> None:
  path = protocol_table.FILE.relative_to(source_tree.ROOT)
  assert f']({path})' in (source_tree.ROOT / 'README.md').read_text()
