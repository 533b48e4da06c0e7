# SPDX-License-Identifier: Apache-2.0
"""Runs that were cut off, and go on."""

from __future__ import annotations

import json
import pathlib
import signal
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest

from sarathi_jax import result_lines
from tests import source_tree
from tests.offline import runs

VOCAB, GOOD, by_id = runs.VOCAB, runs.GOOD, runs.by_id


def write_many(run: runs.Runner) -> None:
  run.write(
    b'{',
    *[
      {
        'request_id': f'r{i}',
        'prompt_token_ids': [i + 2, 7],
        'sampling': {'max_tokens': 1 + i % 7},
      }
      for i in range(12)
    ],
    {'request_id': 'r0', **GOOD},
    {'prompt': 'The fox'},
    [],
  )


@pytest.mark.parametrize('num_whole', [0, 1, 4, 15])
@pytest.mark.parametrize('order', [1, -1])
@pytest.mark.parametrize('cut', [0, 1, 30])
def test_resume_makes_the_same_set(run, num_whole, order, cut):
  """Whatever was written before; the last line may be cut off."""
  write_many(run)
  assert run()[0] == 0
  everything = run.output.read_bytes().splitlines(keepends=True)[::order]
  assert len(everything) == 16
  cut_off = everything[num_whole][:-1][: cut and -cut] if cut else b''
  run.output.write_bytes(b''.join(everything[:num_whole]) + cut_off)
  code, seen = run('--resume')
  assert code == 0
  assert by_id(run.results()) == by_id(list(map(json.loads, everything)))
  assert run.output.read_bytes().startswith(b''.join(everything[:num_whole]))
  if num_whole:
    assert f'{num_whole} results were there already' in seen


def test_resume_when_all_is_done_and_when_nothing_is(run):
  write_many(run)
  assert run('--resume')[0] == 0
  before = run.output.read_bytes()
  assert run('--resume')[0] == 0
  assert run.output.read_bytes() == before


def test_an_output_that_exists_is_left_alone(run):
  run.write(GOOD)
  run.output.write_text('mine\n')
  assert 'exists; --resume goes on with it' in run.fails()
  assert 'line 1 is not one of our results' in run.fails('--resume')
  assert run.output.read_text() == 'mine\n'
  run.output.write_text('mine')  # No end of a line: it was not cut off.
  assert 'line 1 is not one of our results' in run.fails('--resume')
  assert run.output.read_text() == 'mine'
  run.output.write_text('[' * 200_000 + '\n')
  assert 'line 1 is not one of our results' in run.fails('--resume')
  # An input, given as the output by mistake.
  run.write({'request_id': 'a', **GOOD})
  assert 'not one of our results' in run.fails(
    '--resume', f'--output={run.prompts}'
  )
  run.prompts.write_text('{"request_id": "a", "prompt": "b"}')
  assert 'not one of our results' in run.fails(
    '--resume', f'--output={run.prompts}'
  )


def test_a_disk_that_fills_up_within_a_line(run, monkeypatch):
  """What was cut off is written whole by --resume."""
  write_many(run)
  room = 700

  class Disk:
    def __init__(self, file: Any) -> None:
      self._file, self._room = file, room

    def close(self) -> None:
      self._file.close()

    def write(self, data: Any) -> int:
      if not self._room:
        raise OSError(28, 'No space left on device')
      data = data[: min(self._room, 100)]  # Part of it, as a system may.
      self._room -= len(data)
      return self._file.write(data)

  init = result_lines.Output.__init__

  def on_disk(self: Any, *args: Any) -> None:
    init(self, *args)
    self._file = Disk(self._file)

  with monkeypatch.context() as patch:
    patch.setattr(result_lines.Output, '__init__', on_disk)
    assert 'No space left' in run.fails()
  assert run.output.stat().st_size == room
  assert run('--resume')[0] == 0
  assert len(by_id(run.results())) == 16


def start(
  run: runs.Runner,
  hugging_face: pathlib.Path,
  *flags: str,
) -> subprocess.Popen[str]:
  return subprocess.Popen(
    [
      sys.executable,
      '-m',
      'sarathi_jax.offline',
      *run.flags,
      f'--checkpoint={hugging_face}',
      '--max_tokens=60',
      # Or each of them has programs to compile that nothing here runs.
      '--max_adjusted_seqs=0',
      '--nogrammars',
      *flags,
    ],
    stderr=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
    cwd=source_tree.ROOT,
  )


def wait_for_results(
  run: runs.Runner, process: subprocess.Popen[str], at_least: int
) -> None:
  while process.poll() is None:
    if run.output.exists() and (
      run.output.read_bytes().count(b'\n') >= at_least
    ):
      return
    time.sleep(0.002)
  raise AssertionError(process.communicate())


def test_killed_interrupted_and_resumed(cold, hugging_face):
  """Three processes do what one would have done; nothing is done twice."""
  rng = np.random.default_rng(0)
  ids = {f'r{i}' for i in range(60)}
  cold.write(
    *[
      {'request_id': i, 'prompt_token_ids': rng.integers(2, VOCAB, 20).tolist()}
      for i in sorted(ids)
    ]
  )
  process = start(cold, hugging_face)
  wait_for_results(cold, process, 5)
  process.kill()
  process.communicate()
  num_killed = cold.output.read_bytes().count(b'\n')

  process = start(cold, hugging_face, '--resume')
  wait_for_results(cold, process, num_killed + 5)
  process.send_signal(signal.SIGINT)
  out, seen = process.communicate()
  assert process.returncode == 130, seen
  assert 'Interrupted; --resume goes on' in seen
  assert 'Traceback' not in seen and out == ''
  num_interrupted = cold.output.read_bytes().count(b'\n')
  assert 5 <= num_killed < num_interrupted < len(ids)

  process = start(cold, hugging_face, '--resume')
  out, seen = process.communicate()
  assert process.returncode == 0, seen
  assert out == ''
  assert f'{num_interrupted} results were there already' in seen
  assert f'{len(ids) - num_interrupted} in ' in seen
  results = cold.results()
  assert {r['request_id'] for r in results} == ids and len(results) == len(ids)
  assert all(len(r['token_ids']) == 60 for r in results)
