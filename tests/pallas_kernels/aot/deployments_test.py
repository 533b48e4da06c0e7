# SPDX-License-Identifier: Apache-2.0
"""The hybrid step of every deployment, compiled for its GPUs."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
from typing import Any

import pytest

from sarathi_jax.cli import deployment
from sarathi_jax.launch import absent_gpus
from tests import source_tree
from tests.pallas_kernels.aot import matmul

# Two layers a stage have every kernel, copy and collective that all have: of
# those whose layers are of two kinds, one is of each.
_SHALLOW = """
import dataclasses, runpy
_whole = runpy.run_path('configs/{name}.py')
DEVICE = _whole['DEVICE']
def get_config():
  return dataclasses.replace(_whole['get_config'](), {fields})
def get_model():
  model, num = _whole['get_model'](), 2 * get_config().pp
  some = {{name: tuple(range(0, num, 2))
          for name in ('window_layers', 'unrotated_layers')
          if getattr(model, name, None)}}
  return dataclasses.replace(model, num_layers=num, **some)
"""
# A push compiles one of each kind of step; `--slow` has all, with all layers.
# Of each the fields of its engine that are others. Of a device alone
# layers_test.py has a step.
KINDS = {
  'llama2_70b_a40_tp4_pp2': '',  # stages
  # Experts that two devices share, with biases, sinks, windows on some layers;
  # and Hopper's products and sums.
  'gpt_oss_20b_h100': 'tp=2',
}
CONFIGS = sorted(
  path.stem
  for path in (source_tree.ROOT / 'configs').glob('*.py')
  if deployment.read(str(path)).device
)


def test_the_papers_deployments_are_there() -> None:
  assert {
    'mistral_7b_a100',
    'yi_34b_a100_tp2',
    'llama2_70b_a40_tp4_pp2',
    'falcon_180b_a100_tp4_pp2',
    'falcon_180b_a100_tp8',
    'mistral_7b_h100',
  } <= set(CONFIGS)


def test_matrices_that_are_put_together_are_named() -> None:
  """As XLA writes it, of weights that lie apart, and of what is none."""
  lines = """
  %c.23 = bf16[4096,6144]{1,0} concatenate(%p.1, %p.2, %p.3), dimensions={1}
  %c.24 = bf16[4096,6144]{1,0} concatenate(%p.5, %p.6, %p.7), dimensions={1}
  %c.10 = s32[64,2]{1,0} concatenate(%bitcast.7, %bitcast.9), dimensions={1}
  %c.11 = f32[64,8,128]{2,1,0} concatenate(%a, %b), dimensions={2}
  """
  assert absent_gpus.matrix_problems(lines, 4096) == [
    '2 matrices bf16[4096,6144] of weights are put together in each step'
  ]
  assert not absent_gpus.matrix_problems(lines, 64)


@matmul.needs_wheels
@pytest.mark.parametrize('name', KINDS)
def test_a_deployments_step_compiles(name: str, tmp_path: pathlib.Path) -> None:
  """In place, without spills, sending no more than it must."""
  shallow = tmp_path / f'{name}.py'
  shallow.write_text(_SHALLOW.format(name=name, fields=KINDS[name]))
  check_step(shallow, tmp_path / 'plan.json')


@matmul.needs_wheels
@pytest.mark.slow
@pytest.mark.parametrize('name', CONFIGS)
def test_a_deployment_fits(name: str, tmp_path: pathlib.Path) -> None:
  check_step(source_tree.ROOT / f'configs/{name}.py', tmp_path / 'plan.json')


@matmul.needs_wheels
@pytest.mark.slow
@pytest.mark.parametrize('name', ['mistral_7b_a100', 'llama_3_1_70b_h100_tp4'])
def test_a_step_with_adapters_compiles(
  name: str, tmp_path: pathlib.Path
) -> None:
  """They take the bytes of their ranks, and send nothing more."""
  shallow = tmp_path / f'{name}.py'
  shallow.write_text(_SHALLOW.format(name=name, fields=''))
  found = check_step(shallow, tmp_path / 'plan.json', '--max_loras=8')
  model = deployment.read(str(shallow)).model
  tp = 4 if name.endswith('tp4') else 1
  width, inner = model.hidden_size, model.intermediate_size // tp
  q, k = (
    num * model.head_dim // tp for num in (model.num_heads, model.num_kv_heads)
  )
  # Rows and columns of a device's part of each: A has the rows, B the columns.
  sides = ((width, q), (width, k), (width, k), (q, width))
  sides += ((width, inner), (width, inner), (inner, width))
  numbers = 8 * 16 * sum(rows + columns for rows, columns in sides)
  # Side by side, as they are on GPUs, B has the rows of all of its group.
  numbers += 8 * 16 * (2 * (q + 2 * k) + 2 * inner)
  assert found['memory']['adapters'] == 2 * model.num_layers * numbers


def planned(config: pathlib.Path, path: pathlib.Path, *flags: str) -> Any:
  """Compiles a step, and writes its plan to a file; returns it."""
  done = subprocess.run(
    [
      sys.executable,
      '-m',
      'sarathi_jax.plan',
      f'--config={config}',
      f'--json={path}',
      *flags,
    ],
    cwd=source_tree.ROOT,
    text=True,
    capture_output=True,
    check=False,
  )
  print(done.stdout)
  assert done.returncode == 0, done.stderr
  found = json.loads(path.read_text())
  assert found['problems'] == []
  return found


def check_step(config: pathlib.Path, path: pathlib.Path, *flags: str) -> Any:
  """Compiles a step, the plan in a file, and looks at all that it says."""
  found = planned(config, path, *flags)
  memory = found['memory']
  used = (
    memory['weights']
    + memory['kv_cache']
    + memory['temporaries']
    + memory['state']
    + memory['adapters']
  )
  assert used <= memory['usable']
  assert all(found['sequences'].values())
  sent = {one['kind']: one for one in found['sent']}
  reduced = sent.get('all-reduce', {'num_bytes': 0})['num_bytes']
  assert reduced <= 1.01 * found['least_sent'] + 2**20
  return found
