# SPDX-License-Identifier: Apache-2.0
"""Offline runs, from the command line to the lines of the output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache
import numpy as np
import pytest

from checkpoints_convert import convert
from sarathi_jax import loading
from sarathi_jax import offline
from sarathi_jax.engine import metrics
from tests import absl_flags
from tests import tokenizer_fixture
from tests.checkpoints_convert import fake_checkpoint

VOCAB, CONTEXT = 300, 256
ENGINE = ['--token_budget=8', '--max_num_seqs=4', '--page_size=16']
SAMPLING = ['--max_tokens=5', '--ignore_eos']
Result = dict[str, Any]


@pytest.fixture(scope='module')
def hugging_face(tmp_path_factory) -> pathlib.Path:
  """A checkpoint with a tokenizer, as one downloads it."""
  folder = tmp_path_factory.mktemp('checkpoints') / 'tiny[llama]'
  shapes = {
    name: (VOCAB, *shape[1:]) if shape[0] == fake_checkpoint.VOCAB else shape
    for name, shape in fake_checkpoint.llama_shapes().items()}
  fake_checkpoint.write(
    folder, fake_checkpoint.llama_config(
      vocab_size=VOCAB, max_position_embeddings=CONTEXT, bos_token_id=0,
      eos_token_id=1),
    {name: 0.3 * tensor for name, tensor in
     fake_checkpoint.random_tensors(shapes).items()})
  return tokenizer_fixture.write(folder)


@pytest.fixture(scope='module')
def checkpoint(hugging_face) -> pathlib.Path:
  target = hugging_face.with_name('converted')
  convert.convert(hugging_face, target)
  return target


@pytest.fixture(scope='module')
def cache_dir(tmp_path_factory) -> Iterator[pathlib.Path]:
  yield tmp_path_factory.mktemp('cache')
  jax.config.update('jax_compilation_cache_dir', None)
  compilation_cache.reset_cache()


@pytest.fixture(scope='module', autouse=True)
def _flags() -> Iterator[None]:
  with absl_flags.defined(offline.define_flags):
    yield


class Runner:
  """Runs main in this process; files are in a folder of the test's."""

  def __init__(self, folder: pathlib.Path, checkpoint: pathlib.Path,
               cache_dir: pathlib.Path, capsys: Any) -> None:
    self.folder = folder
    self.prompts, self.output = folder / 'in.jsonl', folder / 'out.jsonl'
    self.flags = [
      f'--checkpoint={checkpoint}', f'--prompts={self.prompts}',
      f'--output={self.output}', f'--cache_dir={cache_dir}', *ENGINE,
      *SAMPLING]
    self._capsys = capsys

  def write(self, *lines: Any) -> None:
    """Objects become JSON; bytes stay as they are."""
    self.prompts.write_bytes(b''.join(
      (line if isinstance(line, bytes) else json.dumps(line).encode()) + b'\n'
      for line in lines))

  def __call__(self, *flags: str) -> tuple[int, str]:
    """Returns the exit code and what a person sees."""
    absl_flags.parse(*self.flags, *flags)
    code: Any = 0
    self._capsys.readouterr()
    try:
      offline.main(['offline'])
    except SystemExit as error:
      code = error.code
    seen = self._capsys.readouterr()
    assert seen.out == ''
    return code, seen.err

  def results(self) -> list[Result]:
    return [json.loads(line) for line in self.output.read_bytes().splitlines()]

  def fails(self, *flags: str) -> str:
    """The one clear line of a run that fails."""
    code, seen = self(*flags)
    assert code == 1, seen
    lines = [line for line in seen.splitlines() if line.startswith('error: ')]
    assert len(lines) == 1 and seen.splitlines()[-1] == lines[0], seen
    assert 'Traceback' not in seen
    return lines[0]


@pytest.fixture
def cold(tmp_path, checkpoint, cache_dir, capsys) -> Runner:
  return Runner(tmp_path, checkpoint, cache_dir, capsys)


@pytest.fixture(scope='module')
def load_once() -> Callable[..., Any]:
  loaded: list[Any] = []
  load = loading.load_llm

  def load_llm(*args: Any, **fields: Any) -> Any:
    if not loaded:
      loaded.append(load(*args, **fields))
    engine = loaded[0].engine
    for request_id in list(engine._live):  # of a run that failed
      engine.abort(request_id)
    engine.drain()
    engine.metrics = metrics.EngineMetrics()
    return loaded[0]

  return load_llm


@pytest.fixture
def run(cold, monkeypatch, load_once) -> Runner:
  """With one engine for all tests."""
  monkeypatch.setattr(loading, 'load_llm', load_once)
  return cold


def by_id(results: Sequence[Result]) -> dict[tuple[str, int | None], Result]:
  """Results without times, which differ from run to run."""
  found = {(r['request_id'], r.get('line')):
           {k: v for k, v in r.items() if k != 'metrics'} for r in results}
  assert len(found) == len(results)
  return found


def test_the_format_of_results(run):
  run.write(
    {'prompt': 'The quick'},
    {'request_id': 'ids', 'prompt_token_ids': [5, 6, 7],
     'sampling': {'max_tokens': 2, 'temperature': 0}},
    {'request_id': 'chat', 'messages': [{'role': 'user', 'content': 'Hi'}]},
    b'  ',
    {'prompt': 'Unic\u00f6de', 'sampling': None})
  code, seen = run()
  assert code == 0
  results = {r['request_id']: r for r in run.results()}
  assert set(results) == {'line-1', 'ids', 'chat', 'line-5'}
  ids = results['ids']
  assert set(ids) == {
    'request_id', 'prompt_token_ids', 'token_ids', 'text', 'finish_reason',
    'stop_reason', 'metrics'}
  assert ids['prompt_token_ids'] == [5, 6, 7]
  assert len(ids['token_ids']) == 2
  assert ids['finish_reason'] == 'length' and ids['stop_reason'] is None
  assert results['line-1']['prompt_token_ids'] == list(
    tokenizer_fixture.make().encode('The quick').ids)
  assert len(results['line-1']['token_ids']) == 5
  times = ids['metrics']
  assert times['num_prompt_tokens'] == 3
  assert times['num_output_tokens'] == 2
  assert 0 <= times['scheduling_delay_s'] <= times['ttft_s']
  assert times['ttft_s'] <= times['e2e_s']
  assert times['tpot_s'] > 0
  for words in ('4 in ', '17 tokens', 'TTFT', 'TBT', 'padding', 'preemptions'):
    assert words in seen
  assert 'errors' not in seen


def test_results_do_not_depend_on_order(run):
  """Though they are sampled, without a seed."""
  lines = [{'request_id': f'r{i}', 'prompt_token_ids': [i + 3] * (i + 1)}
           for i in range(9)]
  run.write(*lines)
  assert run()[0] == 0
  first = by_id(run.results())
  assert len({tuple(r['token_ids']) for r in first.values()}) == 9
  run.output.unlink()
  run.write(*reversed(lines))
  assert run()[0] == 0
  assert by_id(run.results()) == first
  run.output.unlink()
  assert run('--seed=1')[0] == 0
  assert by_id(run.results()) != first


GOOD: dict[str, Any] = {'prompt_token_ids': [5, 6]}
BAD_LINES: Sequence[tuple[Any, str]] = (
  (b'{"prompt": "\xff"}', 'not UTF-8'),
  (b'{"prompt": ', 'not JSON'),
  (b'[' * 100_000, 'not JSON'),
  (b'{"prompt_token_ids": [' + b'9' * 5000 + b']}', 'not JSON'),
  ([1, 2], 'must be a JSON object'),
  ({'prompt': 'a', 'promt': 'b'}, 'promt: unknown key'),
  ({'prompt': 'a', '\ud800': 'b'}, 'unknown key'),
  ({'request_id': 5, **GOOD}, 'request_id=5'),
  ({'request_id': '', **GOOD}, "request_id=''"),
  ({}, 'has none'),
  ({'prompt': 'a', **GOOD}, 'has prompt, prompt_token_ids'),
  ({'prompt': 5}, 'prompt=5: must be a text'),
  ({'prompt': None}, 'prompt=None: must be a text'),
  ({'prompt': '\ud800'}, 'prompt'),
  ({'prompt_token_ids': []}, 'the prompt is empty'),
  ({'prompt_token_ids': 'abc'}, 'must be a list of integers'),
  ({'prompt_token_ids': [1, True]}, 'must be a list of integers'),
  ({'prompt_token_ids': [1, 2.0]}, 'must be a list of integers'),
  ({'prompt_token_ids': [1, VOCAB]}, f'unknown token id {VOCAB}'),
  ({'prompt_token_ids': [-1]}, 'unknown token id -1'),
  ({'prompt_token_ids': [5] * CONTEXT}, f'max_model_len={CONTEXT}'),
  ({'messages': []}, 'must be a list of objects'),
  ({'messages': ['hello']}, 'must be a list of objects'),
  ({'sampling': {'max_tokens': 0}, **GOOD}, 'max_tokens=0'),
  ({'sampling': {'max_tokens': -3}, **GOOD}, 'max_tokens=-3'),
  ({'sampling': {'temperature': float('nan')}, **GOOD}, 'temperature=nan'),
  ({'sampling': {'top_p': 0}, **GOOD}, 'top_p=0'),
  ({'sampling': {'top_p': 2}, **GOOD}, 'top_p=2'),
  ({'sampling': {'presence_penalty': 0.5}, **GOOD},
   'presence_penalty=0.5: this sampling field is not supported'),
  ({'sampling': {'temprature': 1}, **GOOD}, 'temprature=1: unknown sampling'),
  ({'sampling': [1], **GOOD}, 'sampling=[1]: must be an object'),
  ({'sampling': 'hot', **GOOD}, "sampling='hot': must be an object"),
  ({'sampling': [], **GOOD}, 'sampling=[]: must be an object'),
  ({'request_id': 'twice', **GOOD}, 'an earlier line has it, too'),
)


def test_bad_lines_are_told_by_number_and_the_rest_is_done(run):
  run.write(
    {'request_id': 'twice', **GOOD}, *(line for line, _ in BAD_LINES),
    {'request_id': 'last', **GOOD})
  code, seen = run()
  assert code == 0
  refused = {r['line']: r for r in run.results() if 'error' in r}
  assert list(refused) == list(range(2, 2 + len(BAD_LINES)))
  for number, (_, words) in enumerate(BAD_LINES, 2):
    assert words in refused[number]['error'], refused[number]
    assert set(refused[number]) == {'request_id', 'line', 'error'}
  assert refused[2]['request_id'] == 'line-2'
  assert refused[1 + len(BAD_LINES)]['request_id'] == 'twice'
  done = {r['request_id'] for r in run.results() if 'error' not in r}
  assert done == {'twice', 'last'}
  assert f'{len(BAD_LINES)}, see the output' in seen


def test_a_file_from_another_system(run):
  """A byte order mark, CRLF, no newline at the end, half a pair in an id."""
  run.prompts.write_bytes(
    b'\xef\xbb\xbf{"request_id": "\\ud800", "prompt_token_ids": [5]}\r\n'
    b'\r\n{"prompt_token_ids": [6]}')
  assert run()[0] == 0
  assert {r['request_id'] for r in run.results()} == {'\ud800', 'line-3'}
  assert run('--resume')[0] == 0
  assert len(run.results()) == 2


def test_sampling_flags_are_for_lines_that_say_nothing_else(run):
  run.write(GOOD, {'sampling': {'max_tokens': 2}, **GOOD})
  assert run('--max_tokens=3', '--temperature=0', '--top_k=4', '--top_p=0.5',
             '--min_p=0.1', '--noignore_eos', '--stop=zzz')[0] == 0
  assert sorted(len(r['token_ids']) for r in run.results()) == [2, 3]


def test_an_empty_input(run):
  run.write()
  code, seen = run()
  assert code == 0 and run.results() == []
  assert '0 in ' in seen


def test_more_lines_than_the_engine_takes_at_once(run):
  run.write(*[{'prompt_token_ids': [i % VOCAB]} for i in range(60)])
  assert run('--max_tokens=2')[0] == 0
  assert len(by_id(run.results())) == 60


def write_many(run: Runner) -> None:
  run.write(
    b'{', *[{'request_id': f'r{i}', 'prompt_token_ids': [i + 2, 7],
             'sampling': {'max_tokens': 1 + i % 7}} for i in range(12)],
    {'request_id': 'r0', **GOOD}, {'prompt': 'The fox'}, [])


@pytest.mark.parametrize('num_whole', [0, 1, 4, 15])
@pytest.mark.parametrize('order', [1, -1])
@pytest.mark.parametrize('cut', [0, 1, 30])
def test_resume_makes_the_same_set(run, num_whole, order, cut):
  """Whatever was written before; the last line may be cut off."""
  write_many(run)
  assert run()[0] == 0
  everything = run.output.read_bytes().splitlines(keepends=True)[::order]
  assert len(everything) == 16
  cut_off = everything[num_whole][:-1][:cut and -cut] if cut else b''
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
  # An input, given as the output by mistake.
  run.write({'request_id': 'a', **GOOD})
  assert 'not one of our results' in run.fails(
    '--resume', f'--output={run.prompts}')


def test_files_that_cant_be_read_or_written(run):
  assert 'in.jsonl\': can\'t be read: No such file' in run.fails()
  run.write(GOOD)
  assert 'can\'t be written: Is a directory' in run.fails(
    f'--output={run.folder}')
  assert 'can\'t be written: No such file' in run.fails(
    f'--output={run.folder}/no/such/folder')
  assert 'can\'t be written: Not a directory' in run.fails(
    f'--output={run.prompts}/out')


def test_a_full_disk(run):
  run.write(GOOD, b'{')
  error = run.fails('--output=/dev/full')
  assert 'No space left on device; --resume goes on' in error


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
      data = data[:min(self._room, 100)]  # Part of it, as a system may.
      self._room -= len(data)
      return self._file.write(data)

  init = offline._Output.__init__

  def on_disk(self: Any, *args: Any) -> None:
    init(self, *args)
    self._file = Disk(self._file)

  with monkeypatch.context() as patch:
    patch.setattr(offline._Output, '__init__', on_disk)
    assert 'No space left' in run.fails()
  assert run.output.stat().st_size == room
  assert run('--resume')[0] == 0
  assert len(by_id(run.results())) == 16


@pytest.mark.parametrize('flags,words', [
  (['--policy=fifo'], ["policy='fifo'", 'sarathi, vllm']),
  (['--token_budget=2'], ['token_budget=2', 'max_num_seqs=4']),
  (['--config=no.py'], ["config='no.py'", 'no such file']),
  (['--max_tokens=0'], ['max_tokens=0']),
  (['--temperature=nan'], ['temperature=nan']),
  (['--top_p=2'], ['top_p=2.0']),
])
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
    f'--checkpoint={cold.folder}/empty[x]')
  assert '/no/such/folder' in cold.fails('--checkpoint=/no/such/folder')


def test_a_truncated_checkpoint(cold, checkpoint):
  cold.write(GOOD)
  copy = cold.folder / 'copy'
  shutil.copytree(checkpoint, copy)
  array = max((p for p in (copy / 'params').rglob('*') if p.is_file()),
              key=lambda p: p.stat().st_size)
  os.truncate(array, array.stat().st_size - 1)
  assert 'truncated' in cold.fails(f'--checkpoint={copy}')


@pytest.mark.parametrize('flags,words', [
  (['--max_model_len=999'], ['max_model_len=999', f'at most {CONTEXT}']),
  (['--attention=magic'], ["attention='magic'", 'xla']),
  (['--num_pages=2', '--max_model_len=64'], ['max_model_len=64', '4 pages']),
])
def test_a_config_that_does_not_fit_the_model(cold, flags, words):
  cold.write(GOOD)
  error = cold.fails(*flags)
  for word in words:
    assert word in error


def start(run: Runner, hugging_face: pathlib.Path, *flags: str,
          ) -> subprocess.Popen[str]:
  return subprocess.Popen(
    [sys.executable, '-m', 'sarathi_jax.offline', *run.flags,
     f'--checkpoint={hugging_face}', '--max_tokens=60', *flags],
    stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    cwd=pathlib.Path(__file__).parents[1])


def wait_for_results(run: Runner, process: subprocess.Popen[str],
                     at_least: int) -> None:
  while process.poll() is None:
    if run.output.exists() and (
        run.output.read_bytes().count(b'\n') >= at_least):
      return
    time.sleep(0.002)
  raise AssertionError(process.communicate())


def test_killed_interrupted_and_resumed(cold, hugging_face):
  """Three processes do what one would have done; nothing is done twice."""
  rng = np.random.default_rng(0)
  ids = {f'r{i}' for i in range(400)}
  cold.write(*[{'request_id': i, 'prompt_token_ids':
                rng.integers(2, VOCAB, 20).tolist()} for i in sorted(ids)])
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
