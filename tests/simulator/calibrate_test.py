# SPDX-License-Identifier: Apache-2.0
"""Fits: made-up tables of known efficiencies give those back."""

from __future__ import annotations

import csv
import dataclasses
import json
import pathlib

import numpy as np
import pytest

from sarathi_jax import errors
from sarathi_jax.simulator import calibrate
from sarathi_jax.simulator import cost_model
from sarathi_jax.simulator import hardware as hardware_lib
from sarathi_jax.simulator import hosts
from sarathi_jax.simulator import operators
from sarathi_jax.simulator import step_tables
from sarathi_jax.simulator import tables
from tests.simulator import cost_model_test

TRUE = hardware_lib.load('a100').with_efficiencies(
  gemm=0.6,
  memory=0.7,
  kernel_s=6e-6,
  elementwise=0.4,
  decode_attention=0.6,
  prefill_attention=0.3,
  attention_s=2e-5,
  collective_s=3e-5,
  nvlink=0.5,
  pcie=0.9,
)


def _write(path: pathlib.Path, rows: list[dict]) -> None:
  with path.open('w', newline='') as file:
    writer = csv.DictWriter(file, rows[0])
    writer.writeheader()
    writer.writerows(rows)


def _ms(seconds: float, rng: np.random.Generator) -> float:
  return float(seconds) * 1e3 * rng.normal(1, 0.03)


def _mlp(
  path: pathlib.Path, width: int, inner: int, rng: np.random.Generator
) -> None:
  rows = []
  for n in (1, 16, 128, 256, 512, 1024, 4096):
    shapes = {
      'attn_pre_proj': (width, width + width // 2),
      'attn_post_proj': (width, width),
      'mlp_up_proj': (width, 2 * inner),
      'mlp_down_proj': (inner, width),
    }
    moved = {
      'input_layernorm': 3 * width,
      'mlp_act': 3 * inner,
      'attn_rope': 2 * width + width // 2,
      'add': 3 * width,
    }
    rows.append(
      {
        'n_head': 32,
        'n_kv_head': 8,
        'n_embd': width,
        'n_expanded_embd': inner,
        'use_gated_mlp': True,
        'num_tokens': n,
        'num_tensor_parallel_workers': 1,
      }
      | {
        f'time_stats.{op}.median': _ms(operators.matmul(TRUE, n, *s), rng)
        for op, s in shapes.items()
      }
      | {
        f'time_stats.{op}.median': _ms(
          operators.elementwise(TRUE, 2 * n * x), rng
        )
        for op, x in moved.items()
      }
    )
  _write(path, rows)


def _others(folder: pathlib.Path, rng: np.random.Generator) -> None:
  common = {
    'n_embd': 8192,
    'n_q_head': 64,
    'n_kv_head': 8,
    'num_tensor_parallel_workers': 2,
  }
  least = TRUE.efficiencies.attention_s
  _write(
    folder / 'a100_attention.csv',
    [
      common
      | {
        'is_prefill': n > 1,
        'batch_size': 8,
        'kv_cache_size': kv,
        'prefill_chunk_size': n if n > 1 else 0,
        'time_stats.attn_decode.median': _ms(
          least + operators.decode_attention(TRUE, 8 * kv, 2 * 4 * 256), rng
        ),
        'time_stats.attn_prefill.median': _ms(
          least
          + operators.prefill_attention(
            TRUE, n, kv, 32, 128, operators.APPENDING
          ),
          rng,
        ),
      }
      for n in (1, 128, 512, 2048)
      for kv in (128, 1024, 4096)
    ],
  )
  _write(
    folder / 'a100_pairwise_all_reduce.csv',
    [
      {
        'collective': 'all_reduce',
        'num_workers': w,
        'devices_per_node': w,
        'max_devices_per_node': 4,
        'size': size,
        'time_stats.all_reduce.median': _ms(
          operators.all_reduce(TRUE, size, w, link), rng
        ),
      }
      for w, link in ((2, 'nvlink'), (4, 'pcie'))
      for size in (2048, 2**20, 2**23, 2**26)
    ],
  )


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  rng = np.random.default_rng(0)
  made = tmp_path_factory.mktemp('tables')
  for name, width, inner in (('one', 4096, 14336), ('two', 8192, 28672)):
    _mlp(made / f'a100_{name}_mlp.csv', width, inner, rng)
  _others(made, rng)
  return made


def test_a_fit_finds_what_the_tables_were_made_with(
  folder: pathlib.Path,
) -> None:
  start = hardware_lib.load('a100')
  read = tables.read(str(folder), 'a100', start)
  fitted = calibrate.fit(start, read)
  for field, value in dataclasses.asdict(TRUE.efficiencies).items():
    found = getattr(fitted.efficiencies, field)
    tolerance = 0.2 if field.endswith('_s') else 0.1  # seen in a few rows
    assert found == pytest.approx(value, rel=tolerance), field
  for median, p90, _ in calibrate.summary(fitted, read).values():
    assert median < 0.05
    assert p90 < 0.12
  left_out = calibrate.leave_one_model_out(start, read)
  assert len(left_out) == 2
  assert all(kinds['linear'][0] < 0.05 for kinds in left_out.values())


def test_a_fit_is_written_and_read(
  folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  calibrate.write(TRUE, str(tmp_path / 'true.json'), 'a test')
  assert hardware_lib.load(str(tmp_path / 'true.json')) == TRUE


def test_unknown_tables_are_refused(tmp_path: pathlib.Path) -> None:
  device = hardware_lib.load('a100')
  with pytest.raises(errors.ConfigError, match=r'has no file a100\*\.csv'):
    tables.read(str(tmp_path), 'a100', device)
  (tmp_path / 'a100_x.csv').write_text('a,b\n1,2\n')
  with pytest.raises(errors.ConfigError, match='none of the tables known'):
    tables.read(str(tmp_path), 'a100', device)


def _steps(cost: cost_model.CostModel) -> list[step_tables.Step]:
  made = [
    step_tables.Step(
      table='t', num_decodes=n, context=1024, chunks=(), seconds=1.0
    )
    for n in (1, 16, 64, 128)
  ]
  made += [
    step_tables.Step(
      table='t', num_decodes=0, context=0, seconds=1.0, chunks=((n, before),)
    )
    for n in (512, 2048)
    for before in (0, 4096)
  ]
  return [dataclasses.replace(s, seconds=s.predict(cost)) for s in made]


def test_the_host_is_fitted_to_whole_steps() -> None:
  true = hosts.Host(launch_s=2e-4, step_s=5e-3, context_s=4e-7)
  cost = cost_model_test.cost_of('mistral_7b_a100')
  found = step_tables.fit_host(cost, _steps(cost.with_host(true)))
  assert found.step_s == pytest.approx(true.step_s, rel=0.05)
  assert found.context_s == pytest.approx(true.context_s, rel=0.05)


def test_a_gpu_check_is_fitted(tmp_path: pathlib.Path) -> None:
  cost = cost_model_test.cost_of('mistral_7b_h100')
  true = cost.with_hardware(
    cost.hardware.with_efficiencies(gemm=0.5, decode_attention=0.6)
  )
  rows = [
    {'step': 'decode', 'sequences': n, 'context': before, 'tokens': 1}
    for n in (1, 128)
    for before in (0, 2047)
  ] + [
    {'step': 'prefill', 'sequences': 1, 'context': before, 'tokens': n}
    for n in (512, 2048)
    for before in (0, 2048)
  ]
  path = tmp_path / 'gpu_check.json'

  def write(seconds: list[float]) -> str:
    path.write_text(
      json.dumps(
        {
          'results': {
            'engine': [
              {**row, 'step_s': s} for row, s in zip(rows, seconds, strict=True)
            ]
          }
        }
      )
    )
    return str(path)

  shapes = step_tables.read_gpu_check(write([1.0] * len(rows)))
  steps = step_tables.read_gpu_check(write([s.predict(true) for s in shapes]))
  found = step_tables.fit_efficiencies(cost, steps).hardware.efficiencies
  assert found.gemm == pytest.approx(0.5, rel=0.05)
  assert found.decode_attention == pytest.approx(0.6, rel=0.05)
  path.write_text('{}')
  with pytest.raises(errors.ConfigError, match='stage engine'):
    step_tables.read_gpu_check(str(path))
