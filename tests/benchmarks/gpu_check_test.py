# SPDX-License-Identifier: Apache-2.0
"""The script that measures on a GPU, tried where there is none."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import types
from typing import Any

import jax
import pytest

from sarathi_jax.benchmarks.gpu import attention
from sarathi_jax.benchmarks.gpu import idle
from sarathi_jax.benchmarks.gpu import journal as journal_lib
from sarathi_jax.benchmarks.gpu import stages
from sarathi_jax.benchmarks.gpu import targets


def run(*args: str) -> subprocess.CompletedProcess[str]:
  return subprocess.run(
    [sys.executable, '-m', 'sarathi_jax.benchmarks.gpu.check', *args],
    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    env=os.environ | {'JAX_PLATFORMS': 'cpu'})


def results(folder: pathlib.Path) -> dict[str, Any]:
  found: dict[str, Any] = json.loads((folder / 'gpu_check.json').read_text())
  return found


def test_stages_add_up_over_runs(tmp_path: pathlib.Path) -> None:
  flags = '--size=tiny', f'--output={tmp_path}'
  first = run(*flags, '--stages=limits')
  assert first.returncode == 0, first.stdout
  second = run(*flags, '--stages=limits,attention')
  assert second.returncode == 0, second.stdout
  assert 'limits: done before' in second.stdout
  found = results(tmp_path)
  assert set(found['results']) == {'limits', 'attention'}
  rows = found['results']['attention']
  assert {row['kind'] for row in rows if 'kind' in row} == {
    'decode', 'prefill', 'hybrid', 'part'}
  assert all(row['us'] > 0 for row in rows)
  assert set(found['over_parts']) == {'hybrid 4 x 64 + 16 after 16'}
  assert set(found['over_alternatives']) == {
    'decode 4 x 64', 'prefill 32 after 0'}

  # A stage that is cut short goes on: what was measured is not measured again.
  path = tmp_path / 'attention.jsonl'
  lines = path.read_text().splitlines(keepends=True)
  path.write_text(''.join(lines[:3]) + lines[3][:20])  # Killed while writing.
  before = journal_lib.Journal(path)
  assert len(before.rows) == 3
  assert not before.is_complete
  done = run(*flags, '--stages=attention')
  assert done.returncode == 0, done.stdout
  after = journal_lib.Journal(path)
  assert after.is_complete
  assert len(after.rows) == len(lines) - 1
  for point, row in before.rows.items():
    assert after.rows[point] == row


def measured(name: str, folder: pathlib.Path) -> list[journal_lib.Row]:
  """The rows of a stage that needs no process of its own."""
  journal = journal_lib.Journal(folder / f'{name}.jsonl')
  stages.STAGES[name](stages.SIZES['tiny'], journal)
  return list(journal.rows.values())


def test_the_tests_are_run(tmp_path: pathlib.Path) -> None:
  rows = measured('tests', tmp_path)
  assert len(rows) > 1 and not [row for row in rows if 'error' in row]


def test_torch_is_measured_on_the_same_shapes(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setenv('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
  monkeypatch.setattr(stages.flags, 'FLAGS', types.SimpleNamespace(
    torch_python=None))
  assert {row['alternative_to'] for row in measured('torch', tmp_path)
          if 'us' in row} == {
    'decode 4 x 64', 'prefill 32 after 0', 'prefill 32 after 64'}


def test_quantized_caches_are_measured(tmp_path: pathlib.Path) -> None:
  rows = measured('quantized', tmp_path)
  assert rows and all(row['us'] > 0 for row in rows)


def test_writing_is_measured(tmp_path: pathlib.Path) -> None:
  assert {row['point'] for row in measured('write', tmp_path)
          if 'us' in row} == {
    f'{kept} 4 {name}' for kept in ('float32', 'int8')
    for name in ('xla', 'pallas_triton')}


def test_other_sizes_are_measured(tmp_path: pathlib.Path) -> None:
  rows = measured('tune', tmp_path)
  assert [row['point'] for row in rows] == [
    'decode 1 x 32: 64, 32, 4, 2', 'decode 1 x 32: 64, 32, 4, 3']
  assert len(targets.best_sizes({'tune': rows})) == 2


def test_mosaic_is_measured_where_jax_has_it(tmp_path: pathlib.Path) -> None:
  row, = measured('mosaic', tmp_path)
  if jax.__version_info__ < (0, 11):
    assert 'must be 0.11 or newer' in row['absent']
  else:
    assert row['us'] > 0 and row['point'] == 'prefill 32 after 0'


def test_a_point_that_fails_is_told_and_tried_again(
    tmp_path: pathlib.Path) -> None:
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


@pytest.mark.slow
def test_the_engine_is_measured(tmp_path: pathlib.Path) -> None:
  done = run('--size=tiny', f'--output={tmp_path}', '--stages=engine',
             f'--cache_dir={tmp_path}')
  assert done.returncode == 0, done.stdout
  rows = {r['point']: r for r in results(tmp_path)['results']['engine']}
  assert list(rows) == [
    'decode 4 x 1 after 63', 'prefill 1 x 32 after 0', 'sampled tokens',
    'serving',
    'engine, decode 4 x 1 after 63']
  gap = rows['engine, decode 4 x 1 after 63']
  assert 0 <= gap['idle'] < 1
  assert gap['traced_idle'] is None  # A CPU's profile shows no device.
  assert gap['context'] > 63
  assert list((tmp_path / 'gpu_check').glob('jit_run*'))  # for later runs


def test_results_of_two_devices_do_not_mix(tmp_path: pathlib.Path) -> None:
  (tmp_path / 'gpu_check.json').write_text(json.dumps({
    'device': 'NVIDIA A40', 'jax': jax.__version__, 'size': 'tiny'}))
  done = run('--size=tiny', f'--output={tmp_path}', '--stages=limits')
  assert done.returncode
  assert "holds results of {'device': 'NVIDIA A40'" in done.stdout.replace(
    '\n', ' ')


@pytest.mark.parametrize(('flag', 'message'), [
  ('--stages=nonsense', '--stages=nonsense: must be of limits, engine'),
  ('--size=full', 'JAX sees no GPU here, but cpu'),
])
def test_what_cannot_be_done_is_said(
    tmp_path: pathlib.Path, flag: str, message: str) -> None:
  done = run(f'--output={tmp_path}', flag)
  assert done.returncode
  assert message in done.stdout.replace('\n', ' ')


def test_counts_of_a_chunk() -> None:
  """Worked by hand: 2 queries after 3 keys see 4 and 5."""
  sweep = attention.Sweep(num_heads=2, num_kv_heads=1, head_dim=16)
  batch = attention.Batch('prefill', 0, 0, 2, 3)
  assert batch.flops(sweep) == 4 * (4 + 5) * 2 * 16
  assert batch.kv_bytes(sweep) == 2 * 5 * 16 * 2
  sweep = dataclasses.replace(sweep, kv_dtype='int8')
  assert batch.kv_bytes(sweep) == 2 * 5 * (16 + 4)


@pytest.mark.parametrize(('intervals', 'expected'), [
  ([], None), ([(3, 3)], None), ([(0, 10)], 0.0),
  ([(0, 4), (6, 10)], 0.2), ([(6, 10), (0, 4)], 0.2),
  ([(0, 8), (1, 2), (7, 9), (9, 10)], 0.0),  # streams beside each other
])
def test_idle_part(intervals: list[tuple[float, float]],
                   expected: float | None) -> None:
  assert idle.idle_part(intervals) == (
    expected if expected is None else pytest.approx(expected))


def test_kernels_are_compared_by_point() -> None:
  rows = [{'point': 'prefill 512 after 0', 'kind': 'prefill', 'us': 12.0},
          {'point': 'prefill 512 after 0 cudnn', 'us': 5.0},
          {'point': 'decode 1 x 512', 'kind': 'decode', 'error': 'none'}]
  found = {'attention': rows, 'mosaic': [
    {'point': 'prefill 512 after 0', 'kind': 'prefill', 'us': 8.0},
    {'point': 'decode 1 x 512', 'kind': 'decode', 'us': 3.0}]}
  assert targets.over_mosaic(found) == {'prefill 512 after 0': 1.5}
  assert not targets.over_mosaic({'mosaic': [
    {'point': 'pallas_mosaic', 'absent': 'no Hopper'}]})


def test_the_best_sizes_are_so_for_all_batches() -> None:
  numbers = dict(wide_rows=64, block_n=32, num_warps=4, num_stages=2)
  found = {'tune': [
    {'batch': 'a', **numbers, 'us': 10.0},
    {'batch': 'b', **numbers, 'us': 20.0},
    {'batch': 'a', **numbers, 'num_warps': 8, 'us': 20.0},
    {'batch': 'b', **numbers, 'num_warps': 8, 'us': 5.0},
    {'batch': 'a', **numbers, 'num_stages': 3, 'us': 1.0},  # not with b
    {**numbers, 'num_stages': 3, 'absent': 'shared memory'}]}
  first, second = targets.best_sizes(found)
  assert (first['num_warps'], second['num_warps']) == (8, 4)
  assert first['over_best'] == pytest.approx((20 * 1) ** .5)
  assert second['over_best'] == pytest.approx((10 * 4) ** .5)


def test_graphs_stand_side_by_side() -> None:
  assert targets.graphs({
    'engine': [{'point': 'decode', 'step_s': 1}, {'point': 'x', 'step_s': 9}],
    'no_graphs': [{'point': 'decode', 'step_s': 2}]}) == [
      {'what': 'decode: step_s', 'engine': 1, 'xla_graphs': None,
       'no_graphs': 2}]


def test_tests_that_did_not_run_are_no_success(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  size = dataclasses.replace(
    stages.SIZES['tiny'], tests=('tests/no_such_test.py',))
  with pytest.raises(RuntimeError, match='pytest: exit status 4'):
    stages._tests(size, journal_lib.Journal(tmp_path / 'x.jsonl'))
  monkeypatch.setattr(sys, 'executable', '/bin/false')  # as without pytest
  with pytest.raises(RuntimeError, match='pytest: exit status 1'):
    stages._tests(size, journal_lib.Journal(tmp_path / 'x.jsonl'))


def test_each_call_has_pages_of_its_own() -> None:
  sweep = attention.Sweep(
    num_heads=2, num_kv_heads=1, head_dim=16, dtype='float32', page_size=16,
    pool_tokens=256, decode_seqs=(2,), decode_contexts=(32,), chunks=(),
    hybrids=(), calls=2)
  batch, = attention.batches(sweep)
  tables = attention.Kernel(sweep, 'xla').arguments(batch)[4]
  assert tables.shape == (2, 8, 2)
  assert len(set(tables[:, :2].ravel().tolist())) == 8


def test_targets_take_the_worst() -> None:
  def row(kind: str, decodes: int, context: int, chunk: int, before: int,
          us: float, **more: float) -> dict[str, Any]:
    batch = attention.Batch(kind, decodes, context, chunk, before)
    return {'point': batch.name, 'kind': kind, 'decodes': decodes,
            'context': context, 'chunk': chunk, 'before': before, 'us': us,
            **more}

  found = {'attention': [
    row('decode', 64, 1024, 0, 0, 10, of_copy=0.9, of_matmul=0.1),
    row('decode', 64, 2048, 0, 0, 20, of_copy=0.8, of_matmul=0.1),
    row('decode', 1, 32768, 0, 0, 5, of_copy=0.75, of_matmul=0.1),
    row('prefill', 0, 0, 512, 0, 10, of_copy=0.1, of_matmul=0.7),
    {'point': 'prefill 512 after 0 cudnn', 'us': 12,
     'alternative_to': 'prefill 512 after 0'},
    row('hybrid', 64, 1024, 448, 0, 11), row('part', 64, 1024, 0, 0, 6),
    row('part', 0, 0, 448, 0, 6)],
    'torch': [{'point': 'prefill 512 after 0 torch', 'us': 8,
               'alternative_to': 'prefill 512 after 0'}],
    'engine': [{'point': 'decode 64 x 1 after 2047', 'of_floor': 1.2},
               {'point': 'sampled tokens', 'tokens': [5, 6, 7, 8]}],
    'xla_graphs': [{'point': 'sampled tokens', 'tokens': [5, 6, 7, 8]}],
    'no_graphs': [{'point': 'sampled tokens', 'tokens': [5, 6, 9, 8]}]}
  verdicts = [(v['worst'], v['met']) for v in targets.judge(found)]
  assert verdicts == [
    (0.8, 'no'), (0.75, 'yes'), (0.7, 'yes'), (0.8, 'no'),
    (pytest.approx(11 / 12), 'yes'), (1.2, 'yes'),
    (None, 'not measured'), (0.75, 'no'), *[(None, 'not measured')] * 2]


def test_what_breaks_its_process_is_left_behind(
    tmp_path: pathlib.Path) -> None:
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
