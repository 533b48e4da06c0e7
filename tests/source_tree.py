# SPDX-License-Identifier: Apache-2.0
"""The project's Python files and what they import, read but not run."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
import dataclasses
import functools
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGES = ('sarathi_jax', 'pallas_kernels', 'checkpoints_convert')
FOLDERS = (*PACKAGES, 'configs', 'examples', 'tests')


@dataclasses.dataclass(frozen=True, slots=True)
class Import:
  """One import of one module.

  Attributes:
    module: one of the project's modules, or the first name of another's.
    is_lazy: it is inside a function, so that it runs only when called, or
      for type checkers alone.
  """

  module: str
  is_lazy: bool

  @property
  def is_ours(self) -> bool:
    return self.module.partition('.')[0] in FOLDERS


@dataclasses.dataclass(frozen=True)
class File:
  """One Python file.

  Attributes:
    path: below the root, with slashes.
    module: its dotted name.
    tree: its syntax.
    num_lines: its length.
    imports: what it imports, of others than the standard library.
  """

  path: str
  module: str
  tree: ast.Module = dataclasses.field(repr=False)
  num_lines: int
  imports: frozenset[Import] = dataclasses.field(
    default=frozenset(), repr=False
  )

  @property
  def is_generated(self) -> bool:
    return '_pb2' in self.path


def module_name(path: pathlib.PurePath) -> str:
  """'a/b/c.py' -> 'a.b.c', 'a/b/__init__.py' -> 'a.b'."""
  return '.'.join(path.with_suffix('').parts).removesuffix('.__init__')


@functools.cache
def files() -> Mapping[str, File]:
  """Every file of the project's folders, by module name, sorted."""
  found = []
  for path in sorted(
    p for folder in FOLDERS for p in (ROOT / folder).rglob('*.py')
  ):
    relative = path.relative_to(ROOT)
    text = path.read_text()
    found.append(
      File(
        relative.as_posix(),
        module_name(relative),
        ast.parse(text),
        len(text.splitlines()),
      )
    )
  names = frozenset(f.module for f in found)
  return {
    f.module: dataclasses.replace(f, imports=frozenset(read_imports(f, names)))
    for f in found
  }


def read_imports(file: File, ours: frozenset[str]) -> Iterator[Import]:
  """What a file imports, given the names of our modules."""
  folder = pathlib.PurePath(file.path).parent
  for node, is_lazy in _walk(file.tree, False):
    for name in _imported(node, ours):
      first = name.partition('.')[0]
      if first in sys.stdlib_module_names:
        continue
      # Scripts see their neighbours so.
      beside = module_name(folder / f'{first}.py')
      if first in FOLDERS:
        yield Import(name, is_lazy)
      elif beside in ours:
        yield Import(beside, is_lazy)
      else:
        yield Import(first, is_lazy)


# Of statements; no statement is below them.
_WITHIN = ast.expr, ast.arguments, ast.keyword, ast.operator, ast.withitem


def _walk(node: ast.AST, is_lazy: bool) -> Iterator[tuple[ast.AST, bool]]:
  """Every statement below, and whether importing the file leaves it out."""
  yield node, is_lazy
  is_lazy |= isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
  is_lazy |= (
    isinstance(node, ast.If) and ast.unparse(node.test) == 'TYPE_CHECKING'
  )
  for child in ast.iter_child_nodes(node):
    if not isinstance(child, _WITHIN):
      yield from _walk(child, is_lazy)


def _imported(node: ast.AST, ours: frozenset[str]) -> Iterator[str]:
  if isinstance(node, ast.Import):
    yield from (alias.name for alias in node.names)
  elif isinstance(node, ast.ImportFrom) and node.module:
    assert not node.level, 'imports are absolute'
    for alias in node.names:
      name = f'{node.module}.{alias.name}'
      yield name if name in ours else node.module


def make_file(path: str, text: str) -> File:
  """A file of these contents, imports included."""
  names = frozenset(
    {
      'sarathi_jax.errors',
      'sarathi_jax.llm',
      'sarathi_jax.types',
      'sarathi_jax.models',
      'sarathi_jax.models.rope',
    }
  )
  file = File(path, module_name(pathlib.PurePath(path)), ast.parse(text), 1)
  return dataclasses.replace(file, imports=frozenset(read_imports(file, names)))
