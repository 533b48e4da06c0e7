# SPDX-License-Identifier: Apache-2.0
"""Imports are read from the tree, and BUILD is written from it."""

from __future__ import annotations

import re

import pytest

from tests import build_file
from tests import source_tree

FILES = source_tree.files()


def test_build_is_up_to_date() -> None:
  assert build_file.PATH.read_text() == build_file.render(), (
    'BUILD differs from the tree: run scripts/update_build'
  )


def test_build_has_each_file_once() -> None:
  text = build_file.PATH.read_text()
  srcs = re.findall(r'srcs = \[(.*?)\]', text, re.S)
  listed = [p for s in srcs for p in re.findall(r'"([^"]+\.py)"', s)]
  assert sorted(listed) == sorted(f.path for f in FILES.values())


def test_build_has_no_cycle() -> None:
  assert build_file.cycle(build_file.targets(FILES)) is None


@pytest.mark.parametrize(
  ('text', 'expected'),
  [
    ('from sarathi_jax import types', {('sarathi_jax.types', False)}),
    (
      'import sarathi_jax.models.rope as r',
      {('sarathi_jax.models.rope', False)},
    ),
    (
      'from sarathi_jax.models import rope, apply',
      {('sarathi_jax.models.rope', False), ('sarathi_jax.models', False)},
    ),
    ('def f():\n  import jax.numpy as jnp', {('jax', True)}),
    ('if TYPE_CHECKING:\n  import jax', {('jax', True)}),
    ('class C:\n  import jax', {('jax', False)}),
    ('try:\n  import jax\nexcept ImportError:\n  pass', {('jax', False)}),
    ('import os, sys', set()),
  ],
)
def test_imports_are_read(text: str, expected: set[tuple[str, bool]]) -> None:
  file = source_tree.make_file('sarathi_jax/errors.py', text)
  assert {(i.module, i.is_lazy) for i in file.imports} == expected


def test_two_targets_that_need_each_other_are_found() -> None:
  files = [
    source_tree.make_file(
      'sarathi_jax/types.py', 'from sarathi_jax import errors'
    ),
    source_tree.make_file(
      'sarathi_jax/errors.py', 'from sarathi_jax import types'
    ),
  ]
  found = build_file.targets({f.module: f for f in files})
  assert found['sarathi_jax/types'].deps == {'sarathi_jax/errors'}
  assert build_file.cycle(found) is not None
