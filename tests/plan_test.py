# SPDX-License-Identifier: Apache-2.0
"""A memory plan says what an engine then takes, or what is missing."""

from __future__ import annotations

from collections import Counter
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from sarathi_jax import config as config_lib
from sarathi_jax import llm as llm_lib
from sarathi_jax import models
from sarathi_jax import page_groups
from sarathi_jax import plan
from sarathi_jax.cli import mains
from sarathi_jax.in_process import building
from sarathi_jax.models import config as model_config_lib
from sarathi_jax.runner import memory as memory_lib
from sarathi_jax.runner import mesh as mesh_lib
from sarathi_jax.runner import placement
from sarathi_jax.runner import programs as programs_lib
from tests import absl_flags
from tests import source_tree
from tests.models import layer_groups_test

MODEL = model_config_lib.LlamaConfig(
  vocab_size=97,
  hidden_size=32,
  intermediate_size=48,
  num_layers=3,
  num_heads=4,
  num_kv_heads=2,
  head_dim=16,
  max_position_embeddings=64,
)
CONFIG = config_lib.EngineConfig(
  tp=2, pp=2, token_budget=8, max_num_seqs=8, page_size=8, num_pages=40
)
_FILE = """
from sarathi_jax import EngineConfig
from sarathi_jax.models import config
def get_config():
  return EngineConfig(
    tp=2, pp=2, token_budget=8, max_num_seqs=8, page_size=8, num_pages=40)
def get_model():
  return config.LlamaConfig(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_layers=3,
    num_heads=4, num_kv_heads=2, head_dim=16, max_position_embeddings=64)
"""


def run(*args: str) -> subprocess.CompletedProcess[str]:
  return subprocess.run(
    [sys.executable, '-m', 'sarathi_jax.plan', *args],
    cwd=source_tree.ROOT,
    capture_output=True,
    text=True,
    check=False,
  )


def call(*args: str) -> Any:
  """Runs it in this process, whose JAX stays as it is."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(os, 'environ', dict(os.environ))
    patch.setattr(jax.config, 'update', lambda name, value: None)
    with absl_flags.defined(plan.define_flags):
      absl_flags.parse(*args)
      return mains.call(plan.main, ['plan'])


def bytes_by_device(tree: Any) -> Counter[jax.Device]:
  count: Counter[jax.Device] = Counter()
  for leaf in jax.tree.leaves(tree):
    for shard in leaf.addressable_shards:
      count[shard.device] += shard.data.nbytes
  return count


def test_a_plan_is_what_the_engine_allocates():
  config = dataclasses.replace(CONFIG, dtype='float32')
  planned = plan.on_cpu(MODEL, config)
  llm = llm_lib.LLM(
    MODEL,
    models.init_params(MODEL, jax.random.key(0), jnp.float32),
    config=config,
    eos_token_ids=(),
  )
  runner = llm._runner
  for what, tree in (
    (planned.weights, runner._leaves),
    (planned.kv_cache, runner._state.kv),
    (planned.state, (runner._state.slots, runner._state.hidden)),
  ):
    found = bytes_by_device(tree)
    assert len(found) == 4
    for size in found.values():
      assert abs(size - what) <= 0.02 * what
  steps = runner._programs
  assert planned.temporaries == max(
    programs_lib.extra_bytes(steps[program])
    for program in (steps.sizes[-1], *steps.others)
  )
  assert planned.kv_tokens == (
    llm.engine.info.num_pages * llm.engine.info.page_size
  )


def test_what_fits_and_what_is_missing():
  fields = dict(
    weights=60,
    state=5,
    temporaries=5,
    page=2,
    page_size=8,
    max_model_len=64,
    max_num_seqs=3,
  )
  fits = memory_lib.MemoryPlan(usable=100, num_pages=15, **fields)
  assert (fits.kv_cache, fits.kv_tokens, fits.missing) == (30, 120, 0)
  assert [fits.num_seqs_at(n) for n in (8, 40, 41, 64)] == [3, 3, 2, 1]
  short = memory_lib.MemoryPlan(usable=80, num_pages=0, **fields)
  assert short.missing == 60 + 5 + 5 + 8 * 2 - 80


def test_the_command(tmp_path: pathlib.Path):
  config, result = tmp_path / 'tiny.py', tmp_path / 'plan.json'
  config.write_text(_FILE)
  done = run(
    f'--config={config}',
    '--device=cpu',
    '--context=16,64,1000',
    f'--json={result}',
  )
  assert done.returncode == 0, done.stderr
  assert 'tiny: 4 x cpu, TP2 PP2' in done.stdout
  found = json.loads(result.read_text())
  assert found['sequences'] == {'16': 8, '64': 5}
  assert found['memory']['kv_tokens'] == 320
  # A flag overrides the file: there is no room for one sequence.
  with pytest.raises(SystemExit, match='num_pages'):
    call(
      f'--config={config}',
      '--device=cpu',
      '--num_pages=4',
      '--max_model_len=64',
    )


@pytest.mark.parametrize(
  'args,words',
  [
    ((), 'config=None: must be given'),
    (('--config=/no/such.py',), 'no such file'),
    (('--config=configs/quickstart.py',), 'must define get_model()'),
    (
      ('--config=configs/yi_34b_a100_tp2.py', '--device=b200'),
      "device='b200': must be cpu or one of a100, a40, h100",
    ),
    (('--config=configs/yi_34b_a100_tp2.py', '--context=0'), 'context='),
    (
      ('--config=configs/yi_34b_a100_tp2.py', '--tp=3', '--device=cpu'),
      "tp=3: must divide the model's num_heads=56",
    ),
  ],
)
def test_what_cant_be_planned(args, words, capsys):
  assert call(*args) == 1
  assert words in capsys.readouterr().err


@pytest.mark.parametrize('name', layer_groups_test.MODELS)
def test_a_cache_of_windows_is_near_the_fewest_bytes(name: str):
  """Of sequences of 32k tokens, beside one prompt that is being computed."""
  model, context = layer_groups_test.MODELS[name], 32768
  config = config_lib.EngineConfig(
    max_model_len=context, max_num_seqs=64, token_budget=1024
  )
  mesh = mesh_lib.make()
  dtype = jnp.dtype(jnp.bfloat16)
  programs = building.step_programs(
    model,
    mesh,
    config,
    layout=placement.of_checkpoint(mesh, dtype),
    kv_dtype=dtype,
  )
  memory = memory_lib.plan(
    model,
    config,
    mesh,
    programs,
    kv_dtype=dtype,
    temporaries=0,
    device_bytes=placement.bytes_of(programs.weights) + (80 << 30),
  )
  num_seqs = memory.num_seqs_at(context)
  assert not memory.problem and num_seqs >= 8
  token = 2 * model.num_kv_heads * model.head_dim * dtype.itemsize
  least = token * sum(
    min(context, model.layer_window(i) or context)
    for i in range(model.num_layers)
  )
  one = page_groups.num_pages(memory.windows, context, memory.page_size)
  assert one * memory.page <= 1.1 * least
  if num_seqs < config.max_num_seqs:  # All that there is is used.
    assert memory.kv_cache <= 1.1 * least * (num_seqs + 1)
