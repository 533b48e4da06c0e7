# SPDX-License-Identifier: Apache-2.0
"""What CONTRIBUTING.md sends people to is there."""

from __future__ import annotations

import re

from tests import source_tree

TEXT = (source_tree.ROOT / 'CONTRIBUTING.md').read_text()


def test_each_file_is_there() -> None:
  named = set(
    re.findall(
      r'`((?:sarathi_jax|pallas_kernels|checkpoints_convert|configs|tests|scripts)'
      r'/[\w./]+)',
      TEXT,
    )
  )
  assert len(named) > 30
  assert not sorted(
    name for name in named if not (source_tree.ROOT / name).exists()
  )


def test_each_kind_of_addition_has_its_proof() -> None:
  _, *sections = TEXT.split('\n## ')
  assert [section.partition('\n')[0] for section in sections] == [
    'A model',
    "A trainer's layout",
    'A sampling field',
    'A kernel',
    'A way to keep weights',
    'A way to quantize',
    'A protocol',
    'A device',
  ]
  for section in sections:
    _, proof, shown = section.partition('Proof: ')
    assert proof and re.search(r'`tests/[\w/]+_test\.py`', shown)
