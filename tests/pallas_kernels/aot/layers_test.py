# SPDX-License-Identifier: Apache-2.0
"""What a layer launches, and the bytes of it, are bounded.

They follow from the compiled program alone. Products are counted as XLA's
kernels; on a GPU, where it times them, cuBLAS's may take their places.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import statistics
import subprocess
import sys

import pytest

from tests import source_tree
from tests.pallas_kernels.aot import matmul

# The first layer can't be told from what comes before it.
_SHALLOW = """
import dataclasses, runpy
_whole = runpy.run_path('configs/{config}.py')
get_config = _whole['get_config']
def get_model():
  return dataclasses.replace(_whole['get_model'](), num_layers=4, {model})
"""


@dataclasses.dataclass(frozen=True)
class Bounds:
  """The most that layers cost today, on average, and so may cost.

  Attributes:
    device: compiled for.
    tokens: decodes of the step; None: the largest step, which has chunks, too.
    launches: of a layer. Of decodes it should be 10 at the most.
    traffic: bytes that are read and written, the cache's left out, as a
      multiple of the weights. Of decodes it should be 1.05 at the most.
    config: of `configs`.
    model: what its model is changed to, as it is written.
  """

  device: str
  tokens: int | None
  launches: float
  traffic: float
  config: str = 'mistral_7b_h100'
  model: str = ''


@matmul.needs_disassembler
@pytest.mark.parametrize('bounds', [Bounds('h100', 64, 10, 1.05)], ids=str)
def test_a_layer(bounds: Bounds, tmp_path: pathlib.Path) -> None:
  check(bounds, tmp_path)


@matmul.needs_disassembler
@pytest.mark.slow
@pytest.mark.parametrize(
  'bounds',
  [
    Bounds('h100', 8, 10, 1.01),
    # Eleven, but for the last layer, which plans for what is sampled from.
    Bounds('h100', None, 15.7, 1.82),
    Bounds('h100', 64, 10, 1.05, model='qkv_bias=True'),  # as Qwen2 has them
    Bounds('a100', 64, 10, 1.05),
    Bounds('a40', 64, 10, 1.05),
    # Routing takes seven; all experts are counted, as tokens may choose all.
    Bounds('h100', 64, 18, 1.015, 'qwen3_30b_a3b_h100'),
  ],
  ids=str,
)
def test_a_layer_of_other_steps(bounds: Bounds, tmp_path: pathlib.Path) -> None:
  check(bounds, tmp_path)


def check(bounds: Bounds, folder: pathlib.Path) -> None:
  """Compiles a step of some layers, and looks at them."""
  config = folder / 'shallow.py'
  config.write_text(_SHALLOW.format(config=bounds.config, model=bounds.model))
  path = folder / 'plan.json'
  done = subprocess.run(
    [
      sys.executable,
      '-m',
      'sarathi_jax.plan',
      f'--config={config}',
      f'--device={bounds.device}',
      *([f'--tokens={bounds.tokens}'] if bounds.tokens else []),
      '--num_pages=2048',
      '--sass',
      f'--json={path}',
    ],
    cwd=source_tree.ROOT,
    text=True,
    capture_output=True,
    check=False,
  )
  print(done.stdout)
  assert done.returncode == 0, done.stderr
  found = json.loads(path.read_text())
  layers = found['layers']
  assert len(layers) == 3
  launches, traffic, least = (
    statistics.fmean(layer[key] for layer in layers)
    for key in ('num_launches', 'bytes', 'least_bytes')
  )
  print(f'{launches:.2f} launches, {traffic / least:.3f} of the weights')
  assert launches <= bounds.launches
  assert traffic <= bounds.traffic * least
  # The same loops as of kernels alone.
  assert {loop['kernel'] for loop in found['loops']} >= {'attend_small'}
