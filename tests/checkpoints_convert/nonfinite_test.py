# SPDX-License-Identifier: Apache-2.0
"""Weights that are NaN or infinite are counted and refused."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from checkpoints_convert import convert
from checkpoints_convert import direct
from checkpoints_convert import transforms
from sarathi_jax import checkpoint
from sarathi_jax import errors
from tests.checkpoints_convert import fake_checkpoint as fake

_UP = 'model.layers.1.mlp.up_proj.weight'
_NORM = 'model.norm.weight'


def _write(folder: pathlib.Path, dtype: str) -> pathlib.Path:
  tensors = fake.random_tensors(fake.llama_shapes(), dtype)
  tensors[_UP][2:4, 3] = np.nan
  tensors[_UP][0, 0] = -np.inf
  tensors[_NORM][5] = np.inf
  return fake.write(folder, fake.llama_config(), tensors)


@pytest.mark.parametrize('dtype', fake.DTYPES)
def test_conversion_counts_them(
  dtype: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(transforms, 'CHUNK_BYTES', 300)  # several chunks
  folder = _write(tmp_path / 'hf', dtype)
  for wanted in fake.DTYPES:
    with pytest.raises(errors.CheckpointError) as caught:
      convert.convert(folder, tmp_path / 'out', dtype=wanted)
    assert f'{_UP} (3), {_NORM} (1); ' in str(caught.value)
    assert '--allow_nonfinite' in str(caught.value)
  assert os.listdir(tmp_path) == ['hf']


def test_they_can_be_allowed(tmp_path: pathlib.Path) -> None:
  folder = _write(tmp_path / 'hf', 'float32')
  done = subprocess.run(
    [
      sys.executable,
      '-m',
      'checkpoints_convert',
      f'--source={folder}',
      f'--target={tmp_path}/out',
      '--allow_nonfinite',
      '--verify',
    ],
    capture_output=True,
    text=True,
    check=False,
    timeout=120,
  )
  assert done.returncode == 0, done.stderr
  scale = checkpoint.restore_params(tmp_path / 'out')['final_norm']['scale']
  assert np.flatnonzero(~np.isfinite(np.asarray(scale))).tolist() == [5]


def test_served_straight_they_are_found_as_they_are_read(
  tmp_path: pathlib.Path,
) -> None:
  params = direct.DirectParams(_write(tmp_path / 'hf', 'bfloat16'))
  whole = (slice(None), slice(None))
  params('layers.0.mlp.up', whole)
  with pytest.raises(errors.CheckpointError, match=rf'{_UP} \(3\)'):
    params('layers.1.mlp.up', whole)
  params('layers.1.mlp.up', (slice(None), slice(8, 16)))  # another device's


def test_many_tensors_are_summed_up() -> None:
  error = transforms.nonfinite_error({f't{i}': 1000 for i in range(8)})
  assert 't4 (1,000) and 3 more tensors; ' in str(error)


@pytest.mark.parametrize('dtype', fake.DTYPES)
def test_count(dtype: str) -> None:
  """Extremes of either sign are numbers; one beyond them is not."""
  kind = fake.DTYPES[dtype]
  infinity = np.array(np.inf, kind).view(f'u{kind.itemsize}')
  largest = (infinity - 1).view(kind)
  fine = np.array([0.0, -0.0, largest, -largest], kind)
  assert transforms.count_nonfinite(fine) == 0
  for bad in (np.inf, -np.inf, np.nan, -np.nan):
    assert transforms.count_nonfinite(np.array([*fine, bad], kind)) == 1
  assert transforms.count_nonfinite(np.full((3, 2), np.nan, kind)[:, :1]) == 3


def test_numbers_too_large_for_bfloat16(tmp_path: pathlib.Path) -> None:
  """float32 holds a little more than bfloat16 rounds to."""
  tensors = fake.random_tensors(fake.llama_shapes())
  tensors[_UP][1, 1] = 3.4e38
  folder = fake.write(tmp_path / 'hf', fake.llama_config(), tensors)
  with pytest.raises(
    errors.CheckpointError,
    match=r'up_proj.*too large for bfloat16; .* to float32',
  ):
    convert.convert(folder, tmp_path / 'out', dtype='bfloat16')
