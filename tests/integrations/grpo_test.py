# SPDX-License-Identifier: Apache-2.0
"""GRPO by tunix's learner, with rollouts by the engine and by its own sampler.

In programs of their own, in tunix's environment: `scripts/test` runs one model,
`scripts/test --slow` the others.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
from typing import Any, NamedTuple

import numpy as np
import pytest

from tests import source_tree

pytestmark = [
  pytest.mark.tunix,
  pytest.mark.skipif(
    importlib.util.find_spec('tunix') is None,
    reason='needs google-tunix, which scripts/test has in another environment',
  ),
]
slow = pytest.mark.slow
_LEARNERS = 'jit(compute_per_token_logps)', 'jit(_train_step)'


def run(folder: pathlib.Path, *command: str) -> str:
  """Returns what a module prints, in a program in which JAX is lenient."""
  names = 'JAX_NUMPY_DTYPE_PROMOTION', 'JAX_NUMPY_RANK_PROMOTION'
  done = subprocess.run(
    [sys.executable, '-m', *command],
    cwd=folder,
    env=os.environ
    | dict(zip(names, ('standard', 'allow'), strict=True))
    | {
      'PYTHONPATH': f'{source_tree.ROOT}:{os.environ.get("PYTHONPATH", "")}',
    },
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  return done.stdout


class Trained(NamedTuple):
  """What a training did.

  Attributes:
    rewards: of each step.
    most: how far log-probabilities are from the learner's, of each step.
    left: what was there before each step, see `watched_grpo`.
  """

  rewards: list[float]
  most: list[float]
  left: list[dict[str, Any]]


def train(folder: pathlib.Path, steps: int, *flags: str) -> Trained:
  told = run(
    folder, 'tests.integrations.watched_grpo', f'--steps={steps}', *flags
  )
  lines = re.findall(r'reward ([\d.]+); .* ([\d.e-]+) at most', told)
  trained = Trained(
    [float(reward) for reward, _ in lines],
    [float(most) for _, most in lines],
    [json.loads(line) for line in told.splitlines() if line[0] == '{'],
  )
  assert len(trained.rewards) == len(trained.left) == steps
  return trained


@pytest.mark.parametrize(
  'model',
  [
    'qwen3',
    pytest.param('llama3', marks=slow),
    pytest.param('gemma3', marks=slow),
  ],
)
def test_rewards_grow_as_with_its_own_sampler(model, tmp_path):
  """On two devices; what is sampled is what is trained, and nothing compiles.

  After the first step, that is, and the update behind it; but for the learner's
  own, which compiles Gemma3's once more.
  """
  ours = train(tmp_path, 20, f'--model={model}')
  theirs = train(tmp_path, 20, f'--model={model}', '--sampler=vanilla')
  assert max(ours.most) < 1e-4
  second, *others = [left['compiled'] for left in ours.left[2:]]
  assert others == [[]] * 17
  if model == 'gemma3':
    second = [name for name in second if name not in _LEARNERS]
  assert second == []
  for rewards in (ours.rewards, theirs.rewards):
    assert np.mean(rewards[-5:]) - rewards[0] > 0.3
  # Other draws, of a few outputs a step: who learns a step later is far off at
  # first.
  curves = np.reshape([ours.rewards, theirs.rewards], (2, 4, 5)).mean(-1)
  np.testing.assert_allclose(*curves[:, 1:], atol=0.25)


@slow
def test_memory_stays_over_a_hundred_updates(tmp_path):
  """Of the learner's own, with the rollouts that it learns by."""
  left = train(tmp_path, 100).left
  assert left[-1]['live_bytes'] == left[2]['live_bytes'] > 100_000
  assert not any(one['compiled'] for one in left[2:])


@slow
def test_memory_stays_as_the_benchmark_measures_it(tmp_path):
  """Nothing is compiled, and 16 bits are near."""
  path = tmp_path / 'found.json'
  small = ('updates=10', 'width=64', 'layers=1', 'prompts=2', 'max_tokens=8')
  run(
    tmp_path,
    'sarathi_jax.benchmarks.rollouts',
    '--runs=1',
    f'--json={path}',
    *(f'--{flag}' for flag in small),
  )
  found = json.loads(path.read_text())['results']
  assert found['memory']['live_bytes_grow_by'] == 0
  assert found['memory']['compiled'] == []
  assert found['logprobs']['float32']['most'] < 1e-4
  assert 0 < found['logprobs']['bfloat16']['mean'] < 0.1
  assert found['speed']['times_as_fast'] > 0
