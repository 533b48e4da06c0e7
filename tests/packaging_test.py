# SPDX-License-Identifier: Apache-2.0
"""What is installed is all that there is, and configs/ with it."""

from __future__ import annotations

import fnmatch
import pathlib
import tomllib

from tests import source_tree

SETUPTOOLS = tomllib.loads((source_tree.ROOT / 'pyproject.toml').read_text())[
  'tool'
]['setuptools']


def folder_of(package: str) -> pathlib.PurePath:
  moved = SETUPTOOLS['package-dir'].get(package)
  return pathlib.PurePath(moved or package.replace('.', '/'))


def test_every_package_is_installed() -> None:
  folders = {
    pathlib.PurePath(file.path).parent
    for module, file in source_tree.files().items()
    if not module.startswith(('tests', 'examples'))
  }
  assert {folder_of(p) for p in SETUPTOOLS['packages']} == folders


def test_files_that_are_no_modules_are_installed() -> None:
  root = source_tree.ROOT / 'sarathi_jax'
  patterns = SETUPTOOLS['package-data']['sarathi_jax']
  for path in root.rglob('*'):
    name = path.relative_to(root).as_posix()
    if (
      path.is_file()
      and path.suffix not in ('.py', '.pyc', '.pyi')
      and (not name.startswith('benchmarks/'))
    ):
      assert any(
        fnmatch.fnmatch(name, pattern.replace('**/', '*'))
        for pattern in patterns
      ), name
