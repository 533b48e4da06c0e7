# SPDX-License-Identifier: Apache-2.0
"""Reading a converted checkpoint, and all the ways in which it can be bad."""

from __future__ import annotations

from collections.abc import Callable
import json
import pathlib
import shutil
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from checkpoints_convert import convert
from sarathi_jax import checkpoint
from sarathi_jax import errors
from tests.checkpoints_convert import fake_checkpoint as fake


@pytest.fixture(scope='module')
def whole(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp('whole')
  convert.convert(fake.llama(folder / 'hf'), folder / 'out')
  return folder / 'out'


@pytest.fixture
def copy(whole: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
  return pathlib.Path(shutil.copytree(whole, tmp_path / 'copy'))


def _edit(
  folder: pathlib.Path, change: Callable[[dict[str, Any]], Any]
) -> None:
  path = folder / 'sarathi.json'
  fields = json.loads(path.read_text())
  change(fields)
  path.write_text(json.dumps(fields))


def _refused(folder: pathlib.Path, match: str) -> None:
  with pytest.raises(errors.CheckpointError, match=match):
    checkpoint.restore_params(folder)


def test_missing_folder(tmp_path: pathlib.Path) -> None:
  _refused(tmp_path / 'none', 'no such folder')


def test_folder_of_something_else(tmp_path: pathlib.Path) -> None:
  _refused(tmp_path, 'not a converted checkpoint.*holds no sarathi.json')


@pytest.mark.parametrize('content', ['', '{', '[]', '\xff'])
def test_damaged_metadata(content: str, copy: pathlib.Path) -> None:
  (copy / 'sarathi.json').write_text(content, encoding='latin-1')
  _refused(copy, r'sarathi\.json')


@pytest.mark.parametrize(
  ('change', 'match'),
  [
    (lambda fields: fields.update(format_version=2), 'format_version=2'),
    (lambda fields: fields.pop('format_version'), 'format_version=None'),
    (lambda fields: fields.update(extra=1), "'extra'"),
    (lambda fields: fields.pop('model'), 'model=None: missing'),
    (lambda fields: fields.update(dtype='int8'), "dtype='int8'"),
    (lambda fields: fields.update(eos_token_ids=['a']), 'eos_token_ids'),
    (lambda fields: fields.update(eos_token_ids=2), 'eos_token_ids'),
    (lambda fields: fields.update(bos_token_id='a'), 'bos_token_id'),
    (lambda fields: fields['model'].update(family='gpt'), "family='gpt'"),
    (lambda fields: fields['model'].update(alibi=True), r'model\.alibi'),
    (lambda fields: fields['model'].pop('head_dim'), r'model\.head_dim'),
    (lambda fields: fields['model'].update(num_heads=0), 'num_heads=0'),
  ],
)
def test_bad_metadata(
  change: Callable[[dict[str, Any]], Any], match: str, copy: pathlib.Path
) -> None:
  _edit(copy, change)
  _refused(copy, match)


_ARRAY = 'layers.1.mlp.down'


def test_missing_array(copy: pathlib.Path) -> None:
  shutil.rmtree(copy / 'params' / _ARRAY)
  _refused(copy, r'lacks layers\.1\.mlp\.down')


def test_missing_chunk(copy: pathlib.Path) -> None:
  (copy / 'params' / _ARRAY / '0.0').unlink()
  _refused(copy, r'0\.0: missing, so layers\.1\.mlp\.down is truncated')


def test_truncated_chunk(copy: pathlib.Path) -> None:
  path = copy / 'params' / _ARRAY / '0.0'
  path.write_bytes(path.read_bytes()[:-4])
  _refused(copy, r'layers\.1\.mlp\.down is truncated')


def test_wrong_shape(copy: pathlib.Path) -> None:
  _edit(copy, lambda fields: fields['model'].update(intermediate_size=32))
  _refused(copy, r'layers\.0\.mlp\.down has shape \(24, 16\).*\(32, 16\)')


def test_wrong_dtype(copy: pathlib.Path) -> None:
  _edit(copy, lambda fields: fields.update(dtype='bfloat16'))
  _refused(copy, 'embed is stored as <f4, and not as bfloat16')


def test_no_params(copy: pathlib.Path) -> None:
  shutil.rmtree(copy / 'params')
  _refused(copy, 'params: no such folder')


def test_damaged_tree(copy: pathlib.Path) -> None:
  (copy / 'params' / '_METADATA').write_text('{')
  _refused(copy, 'params: can not be read')


def test_metadata_goes_through_json(
  whole: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  metadata = checkpoint.load_metadata(whole)
  checkpoint.write_metadata(tmp_path, metadata)
  assert checkpoint.load_metadata(tmp_path) == metadata


def test_metadata_loads_no_jax(whole: pathlib.Path) -> None:
  script = (
    'import sys; from sarathi_jax import checkpoint; '
    f'checkpoint.load_metadata({str(whole)!r}); '
    'print(sorted({"jax", "orbax"} & set(sys.modules)))'
  )
  done = subprocess.run(
    [sys.executable, '-c', script], capture_output=True, text=True, check=True
  )
  assert done.stdout == '[]\n'


def test_sharding(whole: pathlib.Path) -> None:
  mesh = jax.make_mesh((1,), ('tp',), devices=jax.devices()[-1:])
  rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('tp'))
  params = checkpoint.restore_params(whole, rows)
  assert all(leaf.sharding == rows for leaf in jax.tree.leaves(params))
  whole_tree = jax.tree.map(lambda leaf: leaf.sharding, params)
  again = checkpoint.restore_params(whole, whole_tree)
  jax.tree.map(np.testing.assert_array_equal, params, again)


def test_an_ordinary_orbax_checkpoint_will_do(
  whole: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  """What a training loop saves with orbax's defaults."""
  params = checkpoint.restore_params(whole)
  checkpoint.write_metadata(tmp_path, checkpoint.load_metadata(whole))
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / 'params', params)
  again = checkpoint.restore_params(tmp_path)
  jax.tree.map(np.testing.assert_array_equal, params, again)
