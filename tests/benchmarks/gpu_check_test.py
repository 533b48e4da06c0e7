# SPDX-License-Identifier: Apache-2.0
"""The script that measures on a GPU, tried where there is none."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import tarfile
import types
from typing import Any

import pytest

from sarathi_jax.benchmarks import journal as journal_lib
from sarathi_jax.benchmarks.gpu import archive
from sarathi_jax.benchmarks.gpu import check
from sarathi_jax.benchmarks.gpu import preflight
from sarathi_jax.benchmarks.gpu import processes
from sarathi_jax.cli import mains
from tests import absl_flags


def run(*args: str) -> subprocess.CompletedProcess[str]:
  return subprocess.run(
    [sys.executable, '-m', 'sarathi_jax.benchmarks.gpu.check', *args],
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    check=False,
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
  )


def results(folder: pathlib.Path) -> dict[str, Any]:
  found: dict[str, Any] = json.loads((folder / 'gpu_check.json').read_text())
  return found


def names_in(path: pathlib.Path) -> set[str]:
  with tarfile.open(path) as tar:
    return set(tar.getnames())


@pytest.mark.slow
def test_one_call_after_another(tmp_path: pathlib.Path) -> None:
  """What hangs is ended alone, all that is known is packed, a call goes on."""
  out = tmp_path / 'out'
  flags = (
    '--size=tiny',
    f'--output={out}',
    f'--cache_dir={tmp_path}',
    '--stages=preflight,write',
  )
  # The first stage that is left less than it needs is the next call's.
  first = run(*flags, '--budget_s=11', '--hang=preflight')
  assert first.returncode == 1, first.stdout
  assert 'preflight: stopped after 11 s' in first.stdout
  assert 'write: for the next call' in first.stdout
  second = run(*flags)
  assert second.returncode == 0, second.stdout
  assert second.stdout.index('preflight:') < second.stdout.index('write:')
  found = results(out)
  assert set(found['results']) == {'preflight', 'write'}
  limits = next(
    row for row in found['results']['preflight'] if row['point'] == 'limits'
  )
  assert limits['matmul_flops_per_s'] > 0
  last = second.stdout.strip().splitlines()[-1]
  assert last == f'All of it: {out}.tar.gz'
  assert names_in(pathlib.Path(f'{out}.tar.gz')) >= {
    'out/gpu_check.json',
    'out/write.jsonl',
    'out/logs/preflight.log',
  }
  third = run(*flags)
  assert third.returncode == 0, third.stdout
  assert 'write: done before' in third.stdout
  other = json.loads((out / 'device.json').read_text()) | {
    'device': 'NVIDIA A40'
  }
  (out / 'device.json').write_text(json.dumps(other))
  wrong = run(*flags, '--stages=tests')
  assert wrong.returncode == 1
  assert "holds results of {'device': 'NVIDIA A40'" in wrong.stdout


def test_a_stage_that_there_is_not_is_named(capsys) -> None:
  with absl_flags.defined(check.define_flags):
    absl_flags.parse('--stages=nonsense')
    assert mains.call(check.main, ['check']) == 1
  said = capsys.readouterr().err
  assert '--stages=nonsense: must be of preflight, tests' in said


def test_what_cannot_be_done_is_said(tmp_path: pathlib.Path) -> None:
  done = run(f'--output={tmp_path}', '--size=full')
  assert done.returncode == 1
  assert 'JAX sees no GPU here, but cpu' in done.stdout.replace('\n', ' ')


# What a stage's process does, by its journal.
POINTS = """
import os, pathlib, sys, time
from sarathi_jax.benchmarks import journal
j = journal.Journal(pathlib.Path(sys.argv[1]))
def crash(): os.kill(os.getpid(), 6)
def hang(): time.sleep(60)
for point in sys.argv[2:]:
  j.measure(point, {'crash': crash, 'hang': hang}.get(point, dict))
j.complete()
"""


def run_points(
  folder: pathlib.Path, *points: str, code: str = POINTS, most_s: float = 60
) -> tuple[str | None, journal_lib.Journal]:
  path = folder / 'x.jsonl'
  error = processes.run(
    [sys.executable, '-c', code, str(path), *points],
    os.environ | {'PYTHONPATH': str(pathlib.Path.cwd())},
    folder / 'x.log',
    journal_lib.Journal(path),
    most_s,
    folder,
  )
  return error, journal_lib.Journal(path)


def test_a_stage_goes_on_after_a_point_that_crashes(
  tmp_path: pathlib.Path,
) -> None:
  error, journal = run_points(tmp_path, 'a', 'crash', 'b')
  assert error is None and journal.is_complete
  assert journal.rows['crash']['error'] == 'its process ended with -6'
  assert list(journal.rows) == ['a', 'crash', 'b']


def test_a_stage_that_hangs_is_ended_and_its_point_tried_again(
  tmp_path: pathlib.Path,
) -> None:
  error, journal = run_points(tmp_path, 'a', 'hang', 'b', most_s=4)
  assert error == 'stopped after 4 s, run again to go on'
  assert list(journal.rows) == ['a'] and journal.under_way == 'hang'
  assert 'hang' not in journal


def test_a_process_that_gets_nowhere_is_not_started_again(
  tmp_path: pathlib.Path,
) -> None:
  error, journal = run_points(
    tmp_path, code='print("why"); raise SystemExit(3)'
  )
  assert error == 'exit status 3: why\n' and not journal.rows
  with pytest.raises(SystemExit, match='wrong device'):
    run_points(tmp_path, code='print("wrong device"); raise SystemExit(2)')


def test_remedies_are_tried_until_none_is_left(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """As on a machine where any loop in a CUDA graph crashes the process."""
  monkeypatch.setattr(
    check,
    'FLAGS',
    types.SimpleNamespace(output=str(tmp_path), cache_dir=str(tmp_path)),
  )
  seen = []

  def stage(name: str, most_s: float) -> str | None:
    journal = check._journal(name)
    flags = check._environment(name)['XLA_FLAGS']
    seen.append(flags)
    journal.measure(preflight.REMEDIES[0].point, dict)
    point = preflight.REMEDIES[1].point
    if point not in journal:
      if 'command_buffer= ' in f'{flags} ':
        journal.add(point, {'distinct': 4})
      else:
        journal.add_broken(point, 'its process ended with -6')
    return None

  monkeypatch.setattr(check, '_run_stage', stage)
  said = list(check._run_with_remedies('preflight', 10))
  assert len(seen) == 3 and '-WHILE' not in seen[0]
  assert seen[1].endswith('command_buffer=-WHILE')
  assert 'no loops in CUDA graphs: from here on with' in said[0]
  journal = check._journal('preflight')
  assert not journal.has_errors
  # And what comes later has all that helped, last.
  assert check._environment('engine')['XLA_FLAGS'] == seen[2].replace(
    'preflight.txt', 'engine.txt'
  )


def test_archives_are_bounded_and_whole(tmp_path: pathlib.Path) -> None:
  folder = tmp_path / 'out'
  folder.mkdir()
  (folder / 'small.json').write_text('{}')
  (folder / 'long.log').write_bytes(os.urandom(10**6) + b'the end')
  (folder / 'large.bin').write_bytes(os.urandom(3 * 10**6))
  path = tmp_path / 'sub' / 'out.tar.gz'
  left_out = archive.pack(
    {'out': folder, 'no': tmp_path / 'nowhere'}, path, 2 * 10**6
  )
  assert left_out == ['out/large.bin']
  assert path.stat().st_size < 2 * 10**6
  assert names_in(path) == {'out/small.json', 'out/long.log'}
  with tarfile.open(path) as tar:
    log = tar.extractfile('out/long.log')
    assert log and log.read()[-7:] == b'the end'
  assert [p.name for p in path.parent.iterdir()] == ['out.tar.gz']


def test_a_point_that_fails_is_told_and_tried_again(
  tmp_path: pathlib.Path,
) -> None:
  journal = journal_lib.Journal(tmp_path / 'x.jsonl')
  journal.measure('good', lambda: {'us': 1})
  journal.measure('bad', lambda: {'us': 1 // 0})
  journal.complete()
  again = journal_lib.Journal(tmp_path / 'x.jsonl')
  assert again.is_complete and again.has_errors
  assert 'ZeroDivisionError' in again.rows['bad']['error']
  again.measure('good', lambda: {'us': 2})
  again.measure('bad', lambda: {'us': 3})
  assert [row['us'] for row in again.rows.values()] == [1, 3]
  assert not again.has_errors and not again.is_complete


def test_what_breaks_its_process_is_left_behind(tmp_path: pathlib.Path) -> None:
  def fail() -> journal_lib.Row:
    raise RuntimeError('CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access')

  def absent() -> journal_lib.Row:
    try:
      return fail()
    except RuntimeError as error:
      return journal_lib.absent(error)

  path = tmp_path / 'stage.jsonl'
  for point, measured in (('a', fail), ('b', absent)):
    with pytest.raises(SystemExit, match=f'{point}: RuntimeError: CUDA_ERROR'):
      journal_lib.Journal(path).measure(point, measured)
  again = journal_lib.Journal(path)
  assert 'a' in again and 'b' in again and again.has_errors
  again.measure('c', lambda: {'us': 1.0})
  assert 'absent' in journal_lib.absent(RuntimeError('no cuDNN'))
