# SPDX-License-Identifier: Apache-2.0
"""README's table of models is what the converter reads."""

from __future__ import annotations

from checkpoints_convert import families
from tests.checkpoints_convert import models_table


def test_it_is_current() -> None:
  """If not: `python -m tests.checkpoints_convert.models_table`."""
  assert models_table.readme() == models_table.FILE.read_text()


def test_each_architecture_has_its_module() -> None:
  for name, family in families.ARCHITECTURES.items():
    assert families.find(name).read_config and family.models
    assert families.architecture_of(family.model_type) == name
