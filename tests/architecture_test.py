# SPDX-License-Identifier: Apache-2.0
"""Who may import whom, held against every file; BUILD against the tree."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
import functools
import importlib
import json
import re
import subprocess
import sys
import tomllib
from typing import NamedTuple

import pytest

from tests import build_file
from tests import source_tree


class Layer(NamedTuple):
  """Modules that lie at one height.

  Attributes:
    modules: the names that theirs begin with.
    may_import: the layers below that they may import; with '~' only inside
      functions.
  """

  modules: tuple[str, ...]
  may_import: tuple[str, ...] = ()


# From the ground up: a layer sees those that it names, and `base`. A module is
# of the layer with the longest name that begins its own. ARCHITECTURE.md opens
# with the picture of it.
LAYERS: Mapping[str, Layer] = {
  'base': Layer(
    (
      'sarathi_jax.types',
      'sarathi_jax.config',
      'sarathi_jax.errors',
      'sarathi_jax.json_file',
      'sarathi_jax.page_groups',
      'sarathi_jax.sampling_fields',
      'sarathi_jax.sampling_params',
      'sarathi_jax.structured_outputs',
      'sarathi_jax.xla_flags',
      'sarathi_jax',
    ),
    ('~llm',),
  ),
  'kernels': Layer(('pallas_kernels',)),
  'scheduler': Layer(('sarathi_jax.scheduler',)),
  'text': Layer(('sarathi_jax.text',)),
  'grammar': Layer(('sarathi_jax.grammar',), ('text',)),
  'engine': Layer(('sarathi_jax.engine',), ('scheduler', 'text', '~grammar')),
  'models': Layer(('sarathi_jax.models',), ('kernels',)),
  'checkpoint': Layer(('sarathi_jax.checkpoint',), ('models',)),
  'cli': Layer(
    ('sarathi_jax.cli', 'sarathi_jax.quickstart'),
    ('scheduler', 'text', 'engine', 'models'),
  ),
  'converter': Layer(
    ('checkpoints_convert',), ('text', 'models', 'checkpoint', 'cli')
  ),
  'runner': Layer(
    ('sarathi_jax.runner',), ('kernels', 'engine', 'models', 'checkpoint')
  ),
  'llm': Layer(
    ('sarathi_jax.in_process', 'sarathi_jax.llm', 'sarathi_jax.opening'),
    (
      'scheduler',
      'text',
      'engine',
      'models',
      'checkpoint',
      'converter',
      'runner',
    ),
  ),
  'integrations': Layer(
    ('sarathi_jax.integrations',), ('models', 'runner', 'llm')
  ),
  'launch': Layer(
    ('sarathi_jax.launch',),
    ('kernels', 'models', 'checkpoint', 'runner', 'llm'),
  ),
  'server': Layer(
    ('sarathi_jax.server',),
    ('scheduler', 'text', 'engine', 'cli', 'llm', '~launch'),
  ),
  'simulator': Layer(
    ('sarathi_jax.simulator',),
    ('kernels', 'scheduler', 'engine', 'models', 'cli', 'server'),
  ),
  'top': Layer(
    (
      'sarathi_jax.offline',
      'sarathi_jax.batch_files',
      'sarathi_jax.result_lines',
      'sarathi_jax.client',
      'sarathi_jax.top',
      'sarathi_jax.plan',
      'sarathi_jax.benchmarks',
      'configs',
      'examples',
      'tests',
    ),
    (
      'kernels',
      'scheduler',
      'text',
      'grammar',
      'engine',
      'models',
      'checkpoint',
      'cli',
      'converter',
      'runner',
      'llm',
      'integrations',
      'launch',
      'server',
      'simulator',
    ),
  ),
}
# The layers that are to run without much, and what of others they may import.
MAY_IMPORT_OTHERS: Mapping[str, tuple[str, ...]] = {
  'sarathi_jax.types': (),
  'sarathi_jax.config': (),
  'sarathi_jax.errors': (),
  'sarathi_jax.page_groups': (),
  'sarathi_jax.sampling_params': (),
  'sarathi_jax.structured_outputs': (),
  'sarathi_jax.scheduler': ('absl',),
  'sarathi_jax.grammar': ('llguidance', 'numpy'),
  'sarathi_jax.xla_flags': (),
  'sarathi_jax.models.config': (),
  'sarathi_jax.models.facts': (),
  'sarathi_jax.models.layer_groups': (),
  'sarathi_jax.models.published': (),
  'sarathi_jax.models.parallel': (),
  'sarathi_jax.models.quantization': (),
  'sarathi_jax.models.spec': (),
  'sarathi_jax.cli.mains': ('absl',),
  'sarathi_jax.engine': ('absl',),
  'sarathi_jax.text': ('absl', 'jinja2', 'tokenizers'),
  'sarathi_jax.simulator': (
    'absl',
    'grpc',
    'matplotlib',
    'numpy',
    'rich',
    'scipy',
  ),
  'sarathi_jax.runner.batch': ('numpy',),
  'sarathi_jax.runner.packing': ('numpy',),
  'sarathi_jax.server': (
    'absl',
    'google',
    'grpc',
    'grpc_health',
    'grpc_reflection',
    'rich',
    'prometheus_client',
    'smg_grpc_proto',
    'starlette',
    'uvicorn',
    'uvloop',
    'opentelemetry',
    '~jax',
    '~smg',
  ),
  'sarathi_jax.client': ('absl', 'google', 'grpc', 'rich'),
  'sarathi_jax.top': ('absl', 'grpc', 'rich'),
  'pallas_kernels': (
    'jax',
    '~jaxlib',
    'jaxtyping',
    'llvmlite',
    'numpy',
    'absl',
    'rich',
  ),
}
WITHOUT_JAX = (
  'sarathi_jax.scheduler',
  'sarathi_jax.engine.engine',
  'sarathi_jax.engine.fake_runner',
  'sarathi_jax.text.collector',
  'sarathi_jax.models.config',
  'sarathi_jax.models.facts',
  'sarathi_jax.models.published',
  'sarathi_jax.models.parallel',
  'sarathi_jax.cli.deployment',
  'sarathi_jax.xla_flags',
  'sarathi_jax.runner.batch',
  'sarathi_jax.checkpoint',
  'sarathi_jax.offline',
  'sarathi_jax.simulator',
  'sarathi_jax.simulator.capacity',
  'sarathi_jax.simulator.calibrate',
  'sarathi_jax.simulator.live',
  'sarathi_jax.server.server',
  'sarathi_jax.server.main',
  'sarathi_jax.client',
)
# These run the engines we compare with, by the Python of their own.
_PEERS = 'sarathi_jax.benchmarks.peer_workers'
# This one runs the tests.
_TESTS = 'sarathi_jax.benchmarks.gpu.kernel_tests'
_DEFS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_MAINS = ('main', 'run', 'define_flags')  # Their module says what they do.
# Dependencies of our dependencies, which come with them.
_COME_ALONG = {
  'huggingface_hub': 'transformers',
  'tqdm': 'transformers',
  'tensorstore': 'orbax-checkpoint',
}

FILES = source_tree.files()
OURS = {
  name: f
  for name, f in FILES.items()
  if name.partition('.')[0] in source_tree.PACKAGES and not f.is_generated
}


def begins(module: str, prefix: str) -> bool:
  """Whether a module is one of a layer's, by the layer's name."""
  if prefix == 'sarathi_jax':  # The package itself, not what is below it.
    return module == prefix
  return not prefix or f'{module}.'.startswith(f'{prefix}.')


def layer_of(module: str) -> str | None:
  """The layer with the longest name that begins `module`."""
  _, layer = max(
    (
      (len(prefix), name)
      for name, layer in LAYERS.items()
      for prefix in layer.modules
      if begins(module, prefix)
    ),
    default=(0, None),
  )
  return layer


def is_allowed(used: source_tree.Import, allowed: tuple[str, ...]) -> bool:
  return any(
    begins(used.module, name.lstrip('~'))
    and (used.is_lazy or not name.startswith('~'))
    for name in allowed
  )


def test_every_module_has_its_layer() -> None:
  """A new module of sarathi_jax goes into LAYERS, with thought."""
  assert not [n for n in FILES if layer_of(n) is None]


def test_layers_stand_on_those_before_them() -> None:
  """So no two can need each other."""
  below: list[str] = []
  for name, layer in LAYERS.items():
    assert not {n for n in layer.may_import if n[0] != '~'} - set(below), name
    below.append(name)


@pytest.mark.parametrize('file', FILES.values(), ids=lambda f: f.path)
def test_imports_follow_the_layers(file: source_tree.File) -> None:
  name = layer_of(file.module)
  assert name is not None
  seen = {name, *LAYERS[name].may_import}
  if name != 'kernels':  # They stand alone.
    seen.add('base')
  for used in file.imports:
    layer = layer_of(used.module) if used.is_ours else name
    assert layer in seen or (used.is_lazy and f'~{layer}' in seen), (
      f'{name} may not import {used}'
    )


@pytest.mark.parametrize('file', FILES.values(), ids=lambda f: f.path)
def test_other_imports_are_few(file: source_tree.File) -> None:
  others = [i for i in file.imports if not i.is_ours]
  layer = max(
    (n for n in MAY_IMPORT_OTHERS if begins(file.module, n)),
    key=len,
    default=None,
  )
  if layer is not None:
    assert not [
      i for i in others if not is_allowed(i, MAY_IMPORT_OTHERS[layer])
    ]
  if not (begins(file.module, 'tests') or begins(file.module, _PEERS)):
    assert 'torch' not in {i.module for i in others}


@functools.cache
def loaded() -> dict[str, list[str]]:
  """What is there after importing each of WITHOUT_JAX, one after the other."""
  heavy = ('jax', 'jaxlib', 'flax', 'orbax', 'torch', 'transformers')
  done = subprocess.run(
    [
      sys.executable,
      '-c',
      f"""
import importlib, json, sys
found = {{}}
for name in {WITHOUT_JAX}:
  importlib.import_module(name)
  found[name] = [other for other in {heavy} if other in sys.modules]
print(json.dumps(found))""",
    ],
    cwd=source_tree.ROOT,
    check=True,
    capture_output=True,
    text=True,
  )
  found: dict[str, list[str]] = json.loads(done.stdout)
  return found


@pytest.mark.parametrize('name', WITHOUT_JAX)
def test_loads_no_jax(name: str) -> None:
  assert not loaded()[name]


def test_what_is_imported_is_declared() -> None:
  project = tomllib.loads((source_tree.ROOT / 'pyproject.toml').read_text())[
    'project'
  ]
  lines = [
    *project['dependencies'],
    *project['optional-dependencies']['gateway'],
    *project['optional-dependencies']['otel'],
    *project['optional-dependencies']['quickstart'],
    *project['optional-dependencies']['sentencepiece'],
    *project['optional-dependencies']['tunix'],
  ]
  declared = {re.split(r'[^\w-]', line)[0] for line in lines}
  used = {
    _COME_ALONG.get(i.module) or build_file.distribution(i.module)
    for name, f in FILES.items()
    for i in f.imports
    if name in OURS
    and not begins(name, _PEERS)
    and name != _TESTS
    and not i.is_ours
  }
  assert used <= declared


def public_defs(
  file: source_tree.File,
) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
  """Its functions and classes whose names say that others may use them."""
  for node in file.tree.body:
    if (
      isinstance(node, _DEFS)
      and not node.name.startswith('_')
      and node.name not in _MAINS
    ):
      yield node


@pytest.mark.parametrize('file', OURS.values(), ids=lambda f: f.path)
def test_what_is_public_is_documented(file: source_tree.File) -> None:
  assert ast.get_docstring(file.tree), 'a module says what it owns'
  assert not [n.name for n in public_defs(file) if not ast.get_docstring(n)]


@pytest.mark.parametrize(
  'file',
  [f for f in FILES.values() if not f.is_generated],
  ids=lambda f: f.path,
)
def test_files_are_short_and_licensed(file: source_tree.File) -> None:
  assert file.num_lines <= 600
  first = (source_tree.ROOT / file.path).read_text().partition('\n')[0]
  assert first == '# SPDX-License-Identifier: Apache-2.0'


@pytest.mark.parametrize(
  'file',
  [
    f
    for f in OURS.values()
    if any(
      isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == '__all__'
      for n in f.tree.body
    )
  ],
  ids=lambda f: f.path,
)
def test_all_is_sorted_and_complete(file: source_tree.File) -> None:
  module = importlib.import_module(file.module)
  names = list(module.__all__)
  constants_first = sorted(
    names, key=lambda n: (not n.isupper(), not n[0].isupper(), n)
  )
  assert names in (sorted(names), constants_first)
  assert all(hasattr(module, name) for name in names)
  assert {n.name for n in public_defs(file)} <= set(names)
  for node in ast.walk(file.tree):  # What it imports in order to export it.
    if isinstance(node, ast.ImportFrom):
      assert {a.asname for a in node.names if a.asname == a.name} <= set(names)


@pytest.mark.parametrize(
  ('path', 'text'),
  [
    ('sarathi_jax/scheduler/new.py', 'import sarathi_jax.engine.engine'),
    ('sarathi_jax/engine/new.py', 'from sarathi_jax.runner import step'),
    ('sarathi_jax/models/new.py', 'from sarathi_jax import llm'),
    ('pallas_kernels/new.py', 'from sarathi_jax import types'),
    ('sarathi_jax/checkpoint/new.py', 'import checkpoints_convert.main'),
    ('sarathi_jax/__init__.py', 'import sarathi_jax.llm'),
    ('sarathi_jax/server/new.py', 'import sarathi_jax.launch.loading'),
  ],
)
def test_a_forbidden_import_is_found(path: str, text: str) -> None:
  with pytest.raises(AssertionError, match='may not import'):
    test_imports_follow_the_layers(source_tree.make_file(path, text))


@pytest.mark.parametrize(
  ('path', 'text'),
  [
    ('sarathi_jax/scheduler/new.py', 'import numpy'),
    ('sarathi_jax/engine/new.py', 'import jax'),
    ('sarathi_jax/engine/new.py', 'def f():\n  import transformers'),
    ('sarathi_jax/runner/new.py', 'def f():\n  import torch'),
  ],
)
def test_a_forbidden_import_of_others_is_found(path: str, text: str) -> None:
  with pytest.raises(AssertionError):
    test_other_imports_are_few(source_tree.make_file(path, text))
