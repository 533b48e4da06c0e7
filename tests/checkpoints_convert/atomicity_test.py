# SPDX-License-Identifier: Apache-2.0
"""Killed at any moment, a conversion leaves nothing that loads, or all."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

from checkpoints_convert import convert
from checkpoints_convert import staging
from sarathi_jax import checkpoint
from sarathi_jax import errors
from tests.checkpoints_convert import bits
from tests.checkpoints_convert import fake_checkpoint as fake

# Converts in a child of its own, which kills itself as it calls `moment` for
# the n-th time. Importing is slow, so one process forks them all.
_KILL = """
import contextlib, os, pathlib, signal, sys
os.environ['JAX_PLATFORMS'] = 'cpu'
from checkpoints_convert import convert, orbax_writer, staging
from checkpoints_convert import tokenizer_files
from sarathi_jax import checkpoint

source, target = map(pathlib.Path, sys.argv[1:3])
HOMES = {'create': orbax_writer, 'rename': os, 'write_metadata': checkpoint,
         '_sync': staging, 'compare': convert, 'write': tokenizer_files}

def kill_at(moment, n):
  home, count = HOMES[moment], 0
  original = getattr(home, moment)
  def wrapped(*args, **kwargs):
    nonlocal count
    count += 1
    if count == n:
      os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)
  setattr(home, moment, wrapped)

for entry in sys.argv[3:]:
  moment, n = entry.split(':')
  child = os.fork()
  if not child:
    kill_at(moment, int(n))
    convert.convert(source, target, check=True)
    os._exit(0)
  status = os.waitpid(child, 0)[1]
  left = '.' + target.name + '.converting'
  print(entry, os.WIFSIGNALED(status) and os.WTERMSIG(status) == 9,
        target.exists(), (target.parent / left).exists())
child = os.fork()
if not child:
  convert.convert(source, target, check=True)
  os._exit(0)
print('last', os.waitpid(child, 0)[1])
"""

# Creating an array is the start of writing it: the 1st, the 9th of 21. Orbax
# renames its own folder first.
_MOMENTS = (
  'create:1',
  'create:9',
  'create:21',
  'write:1',
  'write_metadata:1',
  'compare:1',
  '_sync:1',
  'rename:1',
  'rename:2',
)


def test_killed_at_any_moment(tmp_path: pathlib.Path) -> None:
  folder = fake.llama(tmp_path / 'hf')
  target = tmp_path / 'out'
  done = subprocess.run(
    [
      sys.executable,
      '-W',
      'ignore',
      '-c',
      _KILL,
      str(folder),
      str(target),
      *_MOMENTS,
    ],
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )
  lines = done.stdout.splitlines()
  assert lines == [
    *(f'{moment} True False True' for moment in _MOMENTS),
    'last 0',
  ], done.stderr
  # The last one went over what the killed ones left.
  bits.verify(folder, target)
  assert sorted(os.listdir(tmp_path)) == ['hf', 'out']


def test_what_a_killed_one_left_does_not_load(tmp_path: pathlib.Path) -> None:
  folder = fake.llama(tmp_path / 'hf')
  target = tmp_path / 'out'
  convert.convert(folder, target)
  (target / 'sarathi.json').unlink()
  with pytest.raises(errors.CheckpointError, match=r'holds no sarathi\.json'):
    checkpoint.restore_params(target)


@pytest.mark.parametrize('kind', ['folder', 'file', 'link'])
def test_an_existing_target_is_refused(
  kind: str, tmp_path: pathlib.Path
) -> None:
  folder = fake.llama(tmp_path / 'hf')
  target = tmp_path / 'out'
  if kind == 'folder':
    (target / 'precious').mkdir(parents=True)
  elif kind == 'file':
    target.touch()
  else:
    target.symlink_to('nowhere')
  with pytest.raises(errors.CheckpointError, match='exists'):
    convert.convert(folder, target)
  assert sorted(os.listdir(tmp_path)) == ['hf', 'out']


def test_an_empty_folder_is_taken(tmp_path: pathlib.Path) -> None:
  folder = fake.llama(tmp_path / 'hf')
  (tmp_path / 'new' / 'out').mkdir(parents=True)
  convert.convert(folder, tmp_path / 'new' / 'out')
  checkpoint.load_metadata(tmp_path / 'new' / 'out')


def test_two_at_once(tmp_path: pathlib.Path) -> None:
  """The second one is refused, and does not disturb the first."""
  source = fake.llama(tmp_path / 'hf')
  target = tmp_path / 'out'
  with staging.staging(target, 0) as folder:
    (folder / 'half').touch()
    with pytest.raises(errors.CheckpointError, match='another conversion'):
      convert.convert(source, target)
    assert (folder / 'half').exists()


def test_target_that_can_not_be_made(tmp_path: pathlib.Path) -> None:
  folder = fake.llama(tmp_path / 'hf')
  (tmp_path / 'file').touch()
  with pytest.raises(errors.CheckpointError, match='can not be written'):
    convert.convert(folder, tmp_path / 'file' / 'out')


def test_disk_too_small(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  folder = fake.llama(tmp_path / 'hf')
  monkeypatch.setattr(
    staging.shutil,
    'disk_usage',
    lambda path: staging.shutil._ntuple_diskusage(100, 90, 10),
  )
  with pytest.raises(errors.CheckpointError, match='the disk has 10 left'):
    convert.convert(folder, tmp_path / 'out')
  assert os.listdir(tmp_path) == ['hf']


_FULL = """
import os, pathlib, resource, signal, sys
os.environ['JAX_PLATFORMS'] = 'cpu'
from checkpoints_convert import convert
from sarathi_jax import errors
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
  convert.convert(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))
except errors.CheckpointError as e:
  print(e)
"""


def test_a_write_that_fails(tmp_path: pathlib.Path) -> None:
  """As on a full disk: files may grow to a thousand bytes only."""
  folder = fake.llama(tmp_path / 'hf')
  done = subprocess.run(
    [sys.executable, '-c', _FULL, str(folder), str(tmp_path / 'out')],
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )
  assert f"target='{tmp_path / 'out'}': can not be written" in done.stdout, (
    done.stderr
  )
  assert os.listdir(tmp_path) == ['hf']


_MEMORY = """
import os, pathlib, sys
os.environ['JAX_PLATFORMS'] = 'cpu'
from checkpoints_convert import convert
from tests.memory import peak

before = peak()
convert.convert(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]),
                check=True)
print(before, peak())
"""


@pytest.mark.slow
def test_peak_memory(tmp_path: pathlib.Path) -> None:
  """A tensor of 512 MiB is never in memory whole, copied or transposed."""
  vocab, width = 65536, 4096
  folder = fake.write(
    tmp_path / 'hf',
    fake.llama_config(
      vocab_size=vocab,
      hidden_size=width,
      intermediate_size=16,
      num_hidden_layers=1,
      num_attention_heads=1,
      num_key_value_heads=1,
      head_dim=16,
    ),
    {},
  )
  prefix = 'model.layers.0'
  shapes = {
    'model.embed_tokens.weight': (vocab, width),
    'lm_head.weight': (vocab, width),
    'model.norm.weight': (width,),
    f'{prefix}.input_layernorm.weight': (width,),
    f'{prefix}.post_attention_layernorm.weight': (width,),
    **{f'{prefix}.self_attn.{name}_proj.weight': (16, width) for name in 'qkv'},
    f'{prefix}.self_attn.o_proj.weight': (width, 16),
    **{
      f'{prefix}.mlp.{name}_proj.weight': (16, width) for name in ('gate', 'up')
    },
    f'{prefix}.mlp.down_proj.weight': (width, 16),
  }
  fake.write_sparse(folder / 'model.safetensors', shapes)
  done = subprocess.run(
    [sys.executable, '-c', _MEMORY, str(folder), str(tmp_path / 'out')],
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  before, after = (int(n) / 2**20 for n in done.stdout.split())
  assert after - before < 400, (before, after)  # MiB
