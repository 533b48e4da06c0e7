# SPDX-License-Identifier: Apache-2.0
"""Finding the checkpoint that is meant, and converting it once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent import futures
import contextlib
import dataclasses
import errno
import json
import os
import pathlib
import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np
import pytest

from checkpoints_convert import changes
from checkpoints_convert import convert
from sarathi_jax import checkpoint
from sarathi_jax import errors
from sarathi_jax import opening
from tests.checkpoints_convert import bits
from tests.checkpoints_convert import fake_checkpoint as fake


def test_resolve_leaves_a_converted_checkpoint_alone(
  tmp_path: pathlib.Path,
) -> None:
  whole = tmp_path / 'out'
  convert.convert(fake.llama(tmp_path / 'hf'), whole)
  assert opening.resolve(whole, tmp_path / 'cache') == whole
  assert not (tmp_path / 'cache').exists()


def test_resolve_converts_once(tmp_path: pathlib.Path) -> None:
  folder, cache = fake.llama(tmp_path / 'hf'), tmp_path / 'cache'
  first = opening.resolve(str(folder), cache)
  made = (first / 'sarathi.json').stat().st_mtime_ns
  assert opening.resolve(folder, cache) == first
  assert (first / 'sarathi.json').stat().st_mtime_ns == made
  (folder / 'config.json').write_text(
    json.dumps(fake.llama_config(eos_token_id=5))
  )
  second = opening.resolve(folder, cache)
  assert second != first
  assert checkpoint.load_metadata(second).eos_token_ids == (5,)


@pytest.mark.parametrize('make', [True, False])
def test_resolve_nothing(make: bool, tmp_path: pathlib.Path) -> None:
  folder = tmp_path / 'some where'
  if make:
    folder.mkdir()
  with pytest.raises(
    errors.CheckpointError, match=r'neither a converted|no such folder'
  ):
    opening.resolve(folder, tmp_path / 'cache')


# Converts as a server that starts would, and stops in the middle.
_CONVERTS = """
import os, sys, time
os.environ['JAX_PLATFORMS'] = 'cpu'
from checkpoints_convert import orbax_writer
from sarathi_jax import opening

def write(*args):
  print('converting', flush=True)
  time.sleep(1000)

if sys.argv[3] == 'stop':
  orbax_writer.write = write
print(opening.resolve(*sys.argv[1:3]))
"""


def test_who_comes_second_waits_and_takes_over_from_one_that_is_killed(
  tmp_path: pathlib.Path,
) -> None:
  folder, cache = fake.llama(tmp_path / 'hf'), tmp_path / 'cache'
  other = subprocess.Popen(
    [sys.executable, '-c', _CONVERTS, str(folder), str(cache), 'stop'],
    stdout=subprocess.PIPE,
    text=True,
  )
  assert other.stdout
  try:
    assert other.stdout.readline() == 'converting\n'
    said: list[str] = []

    def on_wait(line: str) -> None:
      said.append(line)
      threading.Timer(0.3, other.kill).start()

    found = opening.resolve(folder, cache, say=on_wait)
  finally:
    other.kill()
    other.wait()
    other.stdout.close()
  assert said == [
    f'Another process converts {folder} into {found}; waiting for it ...'
  ]
  bits.verify(folder, found)
  assert sorted(os.listdir(cache)) == [found.name]


def test_those_that_come_together_convert_once(tmp_path: pathlib.Path) -> None:
  """Threads, each with a lock of its own, are as good as processes."""
  folder, cache = fake.llama(tmp_path / 'hf'), tmp_path / 'cache'
  said: list[str] = []
  converted: list[str] = []

  @contextlib.contextmanager
  def bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    converted.append(title)
    while len(said) < 3:  # until the others wait
      time.sleep(0.01)
    yield lambda num_bytes: None

  with futures.ThreadPoolExecutor(4) as pool:
    found = list(
      pool.map(
        lambda _: opening.resolve(folder, cache, bar, say=said.append), range(4)
      )
    )
  assert len(set(found)) == 1 and len(converted) == 1
  bits.verify(folder, found[0])


def test_a_conversion_that_fails_fails_for_who_waits_for_it(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  folder, cache = fake.llama(tmp_path / 'hf'), tmp_path / 'cache'
  said: list[str] = []

  def fail(*args: Any) -> None:
    while not said:
      time.sleep(0.01)
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(convert.orbax_writer, 'write', fail)
  with futures.ThreadPoolExecutor(2) as pool:
    jobs = [
      pool.submit(opening.resolve, folder, cache, say=said.append)
      for _ in range(2)
    ]
    for job in jobs:
      with pytest.raises(errors.CheckpointError, match='No space left'):
        job.result(60)


def test_tokenizers_kept_without_conversion_are_whole(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """However many start at once, and in a folder that can only be read."""
  folder, cache = fake.llama(tmp_path / 'hf'), tmp_path / 'cache'
  with futures.ThreadPoolExecutor(4) as pool:
    opened = list(
      pool.map(
        lambda _: opening.open_checkpoint(folder, cache, convert=False),
        range(4),
      )
    )
  (kept,) = os.listdir(cache / 'tokenizers')
  assert {one.folder for one in opened} == {cache / 'tokenizers' / kept}

  def refuse(*args: Any, **fields: Any) -> None:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))

  monkeypatch.setattr(os, 'mkdir', refuse)
  again = opening.open_checkpoint(folder, cache, convert=False)
  assert again.folder == opened[0].folder
  with pytest.raises(errors.CheckpointError, match=r'cache_dir: .*Read-only'):
    opening.open_checkpoint(folder, tmp_path / 'other', convert=False)
  for one in (*opened, again):
    one.read.close()


def _by_version_1(
  monkeypatch: pytest.MonkeyPatch, folder: pathlib.Path, cache: pathlib.Path
) -> pathlib.Path:
  """Converts as the version did that had no number."""
  with monkeypatch.context() as patch:
    patch.setattr(opening._kept, '__defaults__', (1,))
    patch.setattr(changes, 'VERSION', 1)
    made = opening.resolve(folder, cache)
  path = made / 'sarathi.json'
  fields = json.loads(path.read_text())
  assert fields['source'].pop('converter') == 1
  path.write_text(json.dumps(fields))
  return made


def test_what_an_older_version_converted_is_converted_anew(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  folder, cache = fake.llama(tmp_path / 'hf'), tmp_path / 'cache'
  old = _by_version_1(monkeypatch, folder, cache)
  said: list[str] = []
  new = opening.resolve(folder, cache, say=said.append)
  assert new != old
  (line,) = said
  assert line.startswith(f'{folder} is converted anew: since {old} was made, ')
  assert 'tokenizer.model' in line
  assert opening.resolve(folder, cache, say=said.append) == new
  assert said == [line]
  opening.open_checkpoint(folder, cache)  # without a warning


def test_a_converted_checkpoint_of_an_older_version_is_warned_of(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  old = _by_version_1(
    monkeypatch, fake.llama(tmp_path / 'hf'), tmp_path / 'cache'
  )
  with pytest.warns(
    RuntimeWarning,
    match=(f'{old.name}: was converted by version 1 .*tokenizer.model'),
  ) as caught:
    opening.open_checkpoint(old, tmp_path)
  assert 'dropped' not in str(caught[0].message)
  assert caught[0].filename == __file__
  (old / 'generation_config.json').write_text('{"num_beams": 3}')
  with pytest.warns(RuntimeWarning, match=r'dropped: .*num_beams=3'):
    opening.open_checkpoint(old, tmp_path, convert=False)


def test_what_was_not_converted_is_never_old(tmp_path: pathlib.Path) -> None:
  made = tmp_path / 'out'
  convert.convert(fake.llama(tmp_path / 'hf'), made)
  metadata = checkpoint.load_metadata(made)
  for source in ({}, {'format': 'trained'}):
    checkpoint.write_metadata(
      made, dataclasses.replace(metadata, source=source)
    )
    opening.open_checkpoint(made, tmp_path)


def _of_nan(folder: pathlib.Path) -> pathlib.Path:
  tensors = fake.random_tensors(fake.llama_shapes())
  tensors['model.norm.weight'][3] = np.nan
  return fake.write(folder, fake.llama_config(), tensors)


@pytest.mark.parametrize('is_converted', [True, False])
def test_weights_that_are_not_finite_can_be_allowed(
  is_converted: bool, tmp_path: pathlib.Path
) -> None:
  folder, cache = _of_nan(tmp_path / 'hf'), tmp_path / 'cache'

  def scale(**options: Any) -> np.ndarray:
    opened = opening.open_checkpoint(
      folder, cache, convert=is_converted, **options
    )
    return opened.read('final_norm.scale', (slice(None),))

  for _ in range(2):  # What is allowed once isn't for whoever comes next.
    with pytest.raises(
      errors.CheckpointError,
      match=(r'model\.norm\.weight \(1\); .*--allow_nonfinite'),
    ):
      scale()
    assert np.isnan(scale(allow_nonfinite=True)[3])


@pytest.mark.parametrize('is_converted', [True, False])
def test_what_makers_recommend_can_be_left_out(
  is_converted: bool, tmp_path: pathlib.Path
) -> None:
  folder, cache = fake.llama(tmp_path / 'hf'), tmp_path / 'cache'
  file = folder / 'generation_config.json'

  def sampling(where: pathlib.Path = folder, **options: Any) -> dict[str, Any]:
    return opening.open_checkpoint(
      where, cache, convert=is_converted, **options
    ).metadata.default_sampling

  file.write_text('{"do_sample": true, "top_k": 5, "num_beams": 2}')
  with pytest.raises(errors.CheckpointError, match='--nosampling_defaults'):
    sampling()
  assert sampling(sampling_defaults=False) == {}
  file.write_text('{"do_sample": true, "top_k": 5}')
  assert sampling(sampling_defaults=False) == {}
  assert sampling() == {'top_k': 5}
  file.write_text('{"do_sample": false, "top_k": 5, "repetition_penalty": 1.1}')
  assert sampling() == {'repetition_penalty': 1.1}
  file.write_text('{"do_sample": true, "top_k": 5}')
  assert sampling(sampling_defaults=False) == {}
  made = tmp_path / 'out'
  convert.convert(folder, made)
  assert sampling(made) == {'top_k': 5}
  assert sampling(made, sampling_defaults=False) == {}


def test_what_was_converted_is_found_without_the_converter(
  tmp_path: pathlib.Path,
) -> None:
  source = fake.llama(tmp_path / 'hf')
  target = opening.resolve(source, tmp_path / 'cache')
  script = (
    'import sys; from sarathi_jax import opening; '
    f'print(opening.resolve({str(source)!r}, '
    f'{str(tmp_path / "cache")!r})); '
    'print(sorted({"jax", "orbax", "checkpoints_convert.convert"} '
    '& set(sys.modules)))'
  )
  done = subprocess.run(
    [sys.executable, '-c', script], capture_output=True, text=True, check=True
  )
  assert done.stdout == f'{target}\n[]\n'
