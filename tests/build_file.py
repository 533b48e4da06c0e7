# SPDX-License-Identifier: Apache-2.0
"""Writes `BUILD` from the tree: `scripts/update_build`.

One library a package, and one for each module that lies in `sarathi_jax`
itself, since they are of different layers; one test a test file; one binary
for each module that can be run. A target's deps are what its files import.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping, Sequence
import dataclasses
import pathlib

from tests import source_tree

PATH = source_tree.ROOT / 'BUILD'
_HEADER = """\
# SPDX-License-Identifier: Apache-2.0
# Made from the tree by scripts/update_build, and held to it by
# tests/source_tree_test.py. Tests run by pytest.

load("@protobuf//bazel:proto_library.bzl", "proto_library")
load("@rules_python//python:py_binary.bzl", "py_binary")
load("@rules_python//python:py_library.bzl", "py_library")
load("@rules_python//python:py_test.bzl", "py_test")

package(default_visibility = ["//visibility:private"])

licenses(["notice"])

exports_files(["LICENSE"])
"""
_PUBLIC = (
  'sarathi_jax',
  'checkpoints_convert',
  'pallas_kernels/ragged_paged_attention',
)
# Packages that import each other are one target.
_MERGED = {'checkpoints_convert/families': 'checkpoints_convert'} | {
  f'sarathi_jax/server/{folder}': 'sarathi_jax/server'
  for folder in ('guard', 'http', 'protocols', 'queue', 'telling')
}
_DATA = {
  'sarathi_jax/quickstart': 'sarathi_jax/quickstart/**',
  'sarathi_jax/simulator': 'sarathi_jax/simulator/**/*.json',
  'tests/checkpoints_convert': 'tests/checkpoints_convert/*.safetensors',
}
# The first name of an import -> the distribution it comes from.
DISTRIBUTIONS = {
  'absl': 'absl-py',
  'google': 'protobuf',
  'grpc': 'grpcio',
  'grpc_health': 'grpcio-health-checking',
  'grpc_reflection': 'grpcio-reflection',
  'grpc_tools': 'grpcio-tools',
  'opentelemetry': 'opentelemetry-sdk',
  'orbax': 'orbax-checkpoint',
  'tunix': 'google-tunix',
}


@dataclasses.dataclass
class Target:
  """A rule of the BUILD file; `deps` are names of targets or labels."""

  rule: str
  name: str
  files: list[source_tree.File] = dataclasses.field(default_factory=list)
  deps: set[str] = dataclasses.field(default_factory=set)
  attributes: dict[str, str | Sequence[str]] = dataclasses.field(
    default_factory=dict
  )


def distribution(module: str) -> str:
  """The distribution of another's module: 'absl' -> 'absl-py'."""
  return DISTRIBUTIONS.get(module, module.replace('_', '-'))


def _is_binary(file: source_tree.File) -> bool:
  if file.path.startswith('tests/'):
    return False
  return file.path.endswith('/__main__.py') or any(
    isinstance(node, ast.If) and ast.unparse(node.test).startswith('__name__ ')
    for node in file.tree.body
  )


def _target_name(file: source_tree.File) -> str:
  path = pathlib.PurePosixPath(file.path)
  folder = path.parent.as_posix()
  is_own = folder == 'sarathi_jax' and path.stem != '__init__'
  if is_own or _is_test(file):
    return path.with_suffix('').as_posix()
  return _MERGED.get(folder, folder)


def _is_test(file: source_tree.File) -> bool:
  return file.path.startswith('tests/') and file.path.endswith('_test.py')


def targets(files: Mapping[str, source_tree.File]) -> dict[str, Target]:
  """The libraries and tests of the files, then their binaries, by name."""
  found: dict[str, Target] = {}
  for file in files.values():
    name = _target_name(file)
    rule = 'py_test' if _is_test(file) else 'py_library'
    found.setdefault(name, Target(rule, name)).files.append(file)
  owners = {f.module: t.name for t in found.values() for f in t.files}
  for target in found.values():
    target.deps = set(_deps(target, owners))
    target.attributes = dict(_attributes(target))
  for name, owner in _conftests(owners, found):
    found[name].deps.add(owner)
  return found | {t.name: t for t in _binaries(found)}


def _deps(target: Target, owners: Mapping[str, str]) -> Iterator[str]:
  for file in target.files:
    for used in file.imports:
      if not used.is_ours:
        label = distribution(used.module).replace('-', '_')
        yield f'@pypi//{label}'
      elif owners[used.module] != target.name:
        yield owners[used.module]
  if target.rule == 'py_test':
    yield '@pypi//pytest'


def _attributes(target: Target) -> Iterator[tuple[str, str | Sequence[str]]]:
  if target.rule == 'py_test':
    yield 'args', [target.files[0].path]
    yield 'main_module', 'pytest'
  elif target.name.startswith('tests'):
    yield 'testonly', 'True'
  if target.name in _PUBLIC:
    yield 'visibility', ['//visibility:public']


def _conftests(
  owners: Mapping[str, str],
  found: Mapping[str, Target],
) -> Iterator[tuple[str, str]]:
  """What pytest imports by itself: (test, owner of a conftest above it)."""
  for module, owner in owners.items():
    folder, _, last = module.replace('.', '/').rpartition('/')
    if last == 'conftest':
      yield from (
        (name, owner)
        for name, target in found.items()
        if target.rule == 'py_test' and name.startswith(f'{folder}/')
      )


def _binaries(found: Mapping[str, Target]) -> Iterator[Target]:
  for target in found.values():
    for file in target.files:
      if target.rule == 'py_library' and _is_binary(file):
        module = file.module.removesuffix('.__main__')
        yield Target(
          'py_binary',
          f'{module.replace(".", "/")}_main',
          [],
          {target.name},
          {'main_module': module},
        )


def _closure(name: str, found: Mapping[str, Target]) -> set[str]:
  seen: set[str] = set()
  todo = [name]
  while todo:
    if (name := todo.pop()) in found and name not in seen:
      seen.add(name)
      todo.extend(found[name].deps)
  return seen


def cycle(found: Mapping[str, Target]) -> str | None:
  """The name of a target that depends on itself, if there is one."""
  for target in found.values():
    if any(target.name in _closure(dep, found) for dep in target.deps):
      return target.name
  return None


def _string(text: str) -> str:
  return f'"{text}"'


def _list(items: Iterable[str]) -> str:
  items = list(items)
  if len(items) == 1:
    return f'[{_string(items[0])}]'
  return '\n'.join(['[', *(f'        {_string(i)},' for i in items), '    ]'])


def _render(target: Target) -> str:
  values: dict[str, str] = {'name': _string(target.name)}
  if target.files:
    values['srcs'] = _list(sorted(f.path for f in target.files))
  for key, value in target.attributes.items():
    values[key] = (
      value
      if value == 'True'
      else (_string(value) if isinstance(value, str) else _list(value))
    )
  if pattern := _DATA.get(target.name):
    values['data'] = f'glob({_list([pattern])}, allow_empty = True)'
  if target.deps:
    ours = sorted(f':{d}' for d in target.deps if not d.startswith('@'))
    others = sorted(d for d in target.deps if d.startswith('@'))
    values['deps'] = _list(ours + others)
  body = ''.join(f'    {key} = {value},\n' for key, value in values.items())
  return f'{target.rule}(\n{body})\n'


def _protos() -> Iterator[str]:
  for path in sorted((source_tree.ROOT / 'sarathi_jax').rglob('*.proto')):
    name = path.relative_to(source_tree.ROOT).as_posix()
    yield (
      f'proto_library(\n    name = "{name.replace(".", "_")}",\n'
      f'    srcs = ["{name}"],\n)\n'
    )


def render() -> str:
  """What BUILD should be."""
  found = targets(source_tree.files())
  order = sorted(
    found.values(),
    key=lambda t: (t.name.startswith('tests'), t.rule != 'py_library', t.name),
  )
  return '\n'.join([_HEADER, *_protos(), *map(_render, order)])


if __name__ == '__main__':
  PATH.write_text(render())
