# SPDX-License-Identifier: Apache-2.0
"""What mains say of themselves, however they are started."""

from __future__ import annotations

import ast
import dataclasses
import subprocess
import sys
import tomllib
import warnings

from absl import app
import pytest

from sarathi_jax import config as config_lib
from sarathi_jax import errors
from sarathi_jax.cli import mains
from tests import source_tree

SCRIPTS: dict[str, str] = tomllib.loads(
  (source_tree.ROOT / 'pyproject.toml').read_text()
)['project']['scripts']
ENGINE = tuple(
  f.name
  for f in dataclasses.fields(config_lib.EngineConfig)
  if f.name != 'compilation_cache_dir'
)
# Console script -> how Python runs the same, some of its flags.
MAINS = {
  'sarathi-convert': (
    'checkpoints_convert',
    ('source', 'target', 'dtype', 'verify'),
  ),
  'sarathi-serve': (
    'sarathi_jax.server',
    ('checkpoint', 'port', 'served_model_name', *ENGINE),
  ),
  'sarathi-offline': (
    'sarathi_jax.offline',
    ('checkpoint', 'prompts', 'max_tokens', *ENGINE),
  ),
  'sarathi-client': (
    'sarathi_jax.client',
    ('target', 'chat', 'temperature', 'stop'),
  ),
  'sarathi-top': ('sarathi_jax.top', ('target',)),
}


def help_of(*command: str) -> str:
  done = subprocess.run(
    [sys.executable, *command, '--help'],
    capture_output=True,
    text=True,
    check=False,
    cwd=source_tree.ROOT,
  )
  assert done.stderr == ''
  return done.stdout


def test_warnings_are_one_line(
  capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
  def warn() -> None:
    warnings.warn('kept: can not be written.', RuntimeWarning, stacklevel=1)

  monkeypatch.setattr(app, 'run', lambda main: main(['name']))
  with warnings.catch_warnings():
    warnings.simplefilter('always')
    mains.run(warn)
  assert capsys.readouterr().err == 'warning: kept: can not be written.\n'


def test_errors_are_one_line(capsys: pytest.CaptureFixture) -> None:
  def fail() -> None:
    raise errors.ConfigError('tp=3: must divide.')

  assert mains.call(lambda: 3, ['name']) == 3
  assert mains.call(list, ['name', 'a'], takes_arguments=True) == ['a']
  assert capsys.readouterr().err == ''
  assert mains.call(fail, ['name']) == 1
  assert mains.call(fail, ['name', 'a']) == 1
  assert capsys.readouterr().err == (
    'error: tp=3: must divide.\nerror: unexpected argument: a; see --help\n'
  )


@pytest.mark.parametrize('script', SCRIPTS)
def test_help_shows_what_it_is_and_its_flags(script: str) -> None:
  module, _, function = SCRIPTS[script].partition(':')
  doc = ast.get_docstring(source_tree.files()[module].tree, clean=False)
  assert doc
  name, flags = MAINS[script]
  as_module = help_of('-m', name)
  as_script = help_of('-c', f'import {module} as m; m.{function}()')
  for shown in (as_module, as_script):
    assert shown.startswith(doc.rstrip())
    for flag in flags:
      assert f' --{flag}:' in shown or f' --[no]{flag}:' in shown
