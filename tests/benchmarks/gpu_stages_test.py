# SPDX-License-Identifier: Apache-2.0
"""What the stages of scripts/gpu_check measure, tried on a CPU."""

from __future__ import annotations

import dataclasses
import pathlib
import types

import jax
import pytest

from pallas_kernels.ragged_paged_attention import tuning
from sarathi_jax.benchmarks import journal as journal_lib
from sarathi_jax.benchmarks.gpu import attention
from sarathi_jax.benchmarks.gpu import engine
from sarathi_jax.benchmarks.gpu import kernel_tests
from sarathi_jax.benchmarks.gpu import sizes
from sarathi_jax.benchmarks.gpu import stages
from sarathi_jax.benchmarks.gpu import targets

TINY = sizes.SIZES['tiny']
FULL = sizes.SIZES['full']


def measured(name: str, folder: pathlib.Path) -> list[journal_lib.Row]:
  """The rows of a stage, in this process."""
  journal = journal_lib.Journal(folder / f'{name}.jsonl')
  stages.STAGES[name].run(
    stages.Run(TINY, journal, journal_lib.Journal(folder / 'preflight.jsonl'))
  )
  return list(journal.rows.values())


def test_attention_is_measured_and_goes_on(tmp_path: pathlib.Path) -> None:
  rows = measured('attention', tmp_path)
  assert {row['kind'] for row in rows if 'kind' in row} == {
    'decode',
    'prefill',
    'hybrid',
    'part',
  }
  assert all(row['us'] > 0 for row in rows)
  found = {'attention': rows}
  assert set(targets.over_parts(found)) == {'hybrid 4 x 64 + 16 after 16'}
  assert set(targets.over_alternatives(found)) == {
    'decode 4 x 64',
    'prefill 32 after 0',
  }

  # A stage that is cut short goes on: what was measured is not measured again.
  path = tmp_path / 'attention.jsonl'
  lines = path.read_text().splitlines(keepends=True)
  path.write_text(''.join(lines[:6]) + lines[7][:20])  # Killed while writing.
  before = journal_lib.Journal(path)
  assert len(before.rows) == 3 and before.under_way is None
  again = measured('attention', tmp_path)
  assert len(again) == len(rows)
  assert again[:3] == rows[:3] and again[3] != rows[3]


@pytest.mark.slow  # The next has what runs them.
def test_the_tests_are_run(tmp_path: pathlib.Path) -> None:
  rows = measured('tests', tmp_path)
  assert len(rows) > 1 and not [row for row in rows if 'error' in row]


def test_tests_that_fail_or_cannot_run_are_told(tmp_path: pathlib.Path) -> None:
  journal = journal_lib.Journal(tmp_path / 'x.jsonl')
  with pytest.raises(RuntimeError, match='pytest: exit status 4'):
    kernel_tests.run(journal, ['tests/no_such_test.py'])
  (tmp_path / 'some_test.py').write_text(
    'def test_good(): pass\ndef test_bad(): assert 1 == 2\n'
  )
  kernel_tests.run(journal, [str(tmp_path / 'some_test.py')])
  bad, good = (journal.rows[name] for name in sorted(journal.rows))
  assert 'assert 1 == 2' in bad['error'] and 'error' not in good

  # Another run is of what did not pass.
  kernel_tests.run(journal, [str(tmp_path / 'some_test.py')])
  assert journal.rows[sorted(journal.rows)[1]] is good
  assert journal.rows[sorted(journal.rows)[0]] is not bad


def test_torch_is_measured_on_the_same_shapes(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setenv('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
  monkeypatch.setattr(
    stages.flags, 'FLAGS', types.SimpleNamespace(torch_python=None)
  )
  assert {
    row['alternative_to'] for row in measured('torch', tmp_path) if 'us' in row
  } == set(TINY.sweep.compared)


def test_quantized_caches_are_measured(tmp_path: pathlib.Path) -> None:
  rows = measured('quantized', tmp_path)
  assert rows and all(row['us'] > 0 for row in rows)


def test_writing_is_measured(tmp_path: pathlib.Path) -> None:
  assert {
    row['point'] for row in measured('write', tmp_path) if 'us' in row
  } == {
    f'{kind} 4 {name}'
    for kind in ('float32', 'int8', 'norm')
    for name in ('xla', 'pallas_triton')
  }


def test_filters_are_measured(tmp_path: pathlib.Path) -> None:
  assert {
    row['point'] for row in measured('filters', tmp_path) if row['us'] > 0
  } == {
    f'{kind} 2 x 40 {by}'
    for kind in ('normal', 'flat')
    for by in ('pallas_triton', 'xla', '(1024, 4, 4, 8)')
  }


def test_other_sizes_are_measured(tmp_path: pathlib.Path) -> None:
  rows = measured('tune', tmp_path)
  assert [row['point'] for row in rows] == [
    'decode 1 x 32: small 16, 64, 4, 3',
    'decode 1 x 32: small 16, 32, 4, 3',
  ]
  found = {'tune': rows}
  best, _ = targets.best_sizes(found)
  numbers = ', '.join(str(best[name]) for name in tuning.NUMBERS)
  assert targets.tuned_lines(found, TINY.tuned, 'NVIDIA H100 80GB HBM3') == [
    f"('small', 'h100', 'float32', 'float32', 2, 16, 32): ({numbers}),"
  ]


def test_mosaic_is_measured_where_jax_has_it(tmp_path: pathlib.Path) -> None:
  (row,) = measured('mosaic', tmp_path)
  if jax.__version_info__ < (0, 11):
    assert 'must be 0.11 or newer' in row['absent']
  else:
    assert row['us'] > 0 and row['point'] == 'prefill 32 after 0'


def test_steps_are_measured(tmp_path: pathlib.Path) -> None:
  rows = {row['point']: row for row in measured('engine', tmp_path)}
  assert list(rows) == [
    'decode 4 x 1 after 63',
    'kernels, decode 4 x 1 after 63',
    'decode 4 x 1 after 63, top-k and top-p',
    'prefill 1 x 32 after 0',
  ]
  assert rows['kernels, decode 4 x 1 after 63'] == {
    'point': 'kernels, decode 4 x 1 after 63',
    'absent': 'a profile shows no device',
  }  # as of a CPU
  assert rows['prefill 1 x 32 after 0']['step_s'] > 0


def test_other_choices_of_xla_are_measured(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(
    engine,
    'VARIANTS',
    {
      'as served': {},
      'unknown': {'xla_no_such_option': 1},
      'loops in no graph': engine.VARIANTS['loops in no graph'],
    },
  )
  first, unknown, other = measured('variants', tmp_path)
  assert first['over'] == 1 and other['over'] > 0
  assert 'xla_no_such_option' in unknown['absent']
  assert targets._same_tokens({'variants': [first, unknown, other]}) == [1.0]
  assert len(set(first['tokens'])) > 1  # drawn, each with its own seed


@pytest.mark.slow
def test_the_whole_engine_is_measured(tmp_path: pathlib.Path) -> None:
  serving, gap = measured('serving', tmp_path)
  assert serving['output_tokens'] > 0
  assert 0 <= gap['idle'] < 1
  assert gap['traced_idle'] is None  # A CPU's profile shows no device.
  assert gap['context'] > 63


def test_the_work_of_a_step() -> None:
  """By hand: 2 layers, D=8, F=12, H=2, K=1, h=4, V=16, 2 bytes a number."""
  model = dataclasses.replace(
    TINY.model,
    vocab_size=16,
    hidden_size=8,
    intermediate_size=12,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
  )
  work = engine.Work.of(model, engine.make_params(model, 'bfloat16'))
  layer = 8 * (8 + 4 + 4 + 8) + 3 * 8 * 12 + 2 * 8  # and two norms
  assert work.read_bytes == 2 * (2 * layer + 8 + 8 * 16)
  assert work.kv_bytes == 2 * 2 * 1 * 4 * 2
  # The last layer makes keys and values of all tokens, the rest of the last.
  left_out = layer - 2 * 8 * 4
  point = engine.Point(1, 3, 2)
  pairs = 5 + (4 + 5)  # last layer: the last token; the other: both
  assert work.flops(point) == (
    2 * (2 * layer - left_out) * 2 + 2 * (left_out + 8 * 16) + pairs * 4 * 2 * 4
  )
  assert work.num_bytes(point) == work.read_bytes + 5 * work.kv_bytes


def test_the_first_call_is_of_one_size() -> None:
  """What is said of it: README.md beside the script."""
  assert len(FULL.sweep.batches) == 14 and len(FULL.sweep.compared) == 5
  names = [batch.name for batch in FULL.sweep.batches]
  assert set(FULL.sweep.compared) <= set(names)
  assert len(FULL.mosaic.batches) == 8
  assert {batch.name for batch in FULL.mosaic.batches} <= set(names)
  assert len(FULL.tuned.batches) == 3 and FULL.num_tried == 5
  assert len(FULL.rest.batches) == 38
  assert not set(FULL.rest.batches) & set(FULL.sweep.batches)
  tokens = {p.sequences * p.tokens for p in FULL.points}
  assert tokens == {64, 1, 128, 512, 2048}  # 1: a step of 8
  assert FULL.points[0].tokens == 1 and FULL.points[0].profiled
  assert sum(p.filtered for p in FULL.points) == 1


def test_counts_of_a_chunk() -> None:
  """Worked by hand: 2 queries after 3 keys see 4 and 5."""
  sweep = attention.Sweep(batches=(), num_heads=2, num_kv_heads=1, head_dim=16)
  batch = attention.Batch('prefill', 0, 0, 2, 3)
  assert batch.flops(sweep) == 4 * (4 + 5) * 2 * 16
  assert batch.kv_bytes(sweep) == 2 * 5 * 16 * 2
  sweep = dataclasses.replace(sweep, kv_dtype='int8')
  assert batch.kv_bytes(sweep) == 2 * 5 * (16 + 4)


def test_each_call_has_pages_of_its_own() -> None:
  sweep = attention.Sweep(
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    dtype='float32',
    page_size=16,
    pool_tokens=256,
    batches=attention.decodes((2, 32)),
    calls=2,
  )
  (batch,) = sweep.batches
  tables = attention.Kernel(sweep, 'xla').arguments(batch)[4]
  assert tables.shape == (2, 8, 2)
  assert len(set(tables[:, :2].ravel().tolist())) == 8
