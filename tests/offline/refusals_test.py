# SPDX-License-Identifier: Apache-2.0
"""Runs that fail, with one clear line."""

from __future__ import annotations

import os
import shutil

import pytest

from tests.offline import runs

CONTEXT, GOOD = runs.CONTEXT, runs.GOOD


def test_files_that_cant_be_read_or_written(run):
  assert "in.jsonl': can't be read: No such file" in run.fails()
  run.write(GOOD)
  assert "can't be written: Is a directory" in run.fails(
    f'--output={run.folder}'
  )
  assert "can't be written: No such file" in run.fails(
    f'--output={run.folder}/no/such/folder'
  )
  assert "can't be written: Not a directory" in run.fails(
    f'--output={run.prompts}/out'
  )


def test_a_full_disk(run):
  run.write(GOOD, b'{')
  error = run.fails('--output=/dev/full')
  assert 'No space left on device; --resume goes on' in error


@pytest.mark.parametrize(
  'flags,words',
  [
    (['--policy=fifo'], ["policy='fifo'", 'sarathi, vllm']),
    (['--token_budget=2'], ['token_budget=2', 'max_num_seqs=4']),
    (['--config=no.py'], ["config='no.py'", 'no such file']),
    (['--max_tokens=0'], ['max_tokens=0']),
    (['--temperature=nan'], ['temperature=nan']),
    (['--top_p=2'], ['top_p=2.0']),
  ],
)
def test_wrong_flags_are_told_before_anything_is_written(run, flags, words):
  run.write(GOOD)
  error = run.fails(*flags)
  for word in words:
    assert word in error
  assert not run.output.exists()


def test_a_missing_checkpoint(cold):
  cold.write(GOOD)
  (cold.folder / 'empty[x]').mkdir()
  assert 'empty[x]: neither a converted checkpoint' in cold.fails(
    f'--checkpoint={cold.folder}/empty[x]'
  )
  assert '/no/such/folder' in cold.fails('--checkpoint=/no/such/folder')


def test_a_truncated_checkpoint(cold, checkpoint):
  cold.write(GOOD)
  copy = cold.folder / 'copy'
  shutil.copytree(checkpoint, copy)
  array = max(
    (p for p in (copy / 'params').rglob('*') if p.is_file()),
    key=lambda p: p.stat().st_size,
  )
  os.truncate(array, array.stat().st_size - 1)
  assert 'truncated' in cold.fails(f'--checkpoint={copy}')


@pytest.mark.parametrize(
  'flags,words',
  [
    (['--max_model_len=999'], ['max_model_len=999', f'at most {CONTEXT}']),
    (['--attention=magic'], ["attention='magic'", 'xla']),
    (['--num_pages=2', '--max_model_len=64'], ['max_model_len=64', '4 pages']),
  ],
)
def test_a_config_that_does_not_fit_the_model(cold, flags, words):
  cold.write(GOOD)
  error = cold.fails(*flags)
  for word in words:
    assert word in error


def test_a_conversion_is_told_and_done_once(cold, hugging_face):
  """Even where the run fails after it."""
  cold.write(GOOD)
  flags = (
    f'--checkpoint={hugging_face}',
    f'--cache_dir={cold.folder}/cache',
    '--max_model_len=200',
    '--num_pages=1',
  )
  told = f'Converting {hugging_face} (once) ...\n'
  # What the model can't is told before.
  code, seen = cold(*flags, '--max_model_len=999')
  assert code == 1 and told not in seen and 'max_model_len=999' in seen
  assert told in cold(*flags)[1]
  code, seen = cold(*flags)
  assert code == 1 and told not in seen and 'max_model_len=200' in seen
