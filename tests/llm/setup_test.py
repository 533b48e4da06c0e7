# SPDX-License-Identifier: Apache-2.0
"""LLMs that can, and that can not, be made."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import sarathi_jax
from sarathi_jax import errors
from sarathi_jax import llm as llm_lib
from sarathi_jax import types
from tests import source_tree
from tests import tiny
from tests.llm import common

GREEDY, PROMPTS = common.GREEDY, common.PROMPTS
tokens_of = common.tokens_of


@pytest.mark.parametrize('fields,words', [
  (dict(max_model_len=65), ['max_model_len=65', 'at most 64']),
  (dict(policy='fifo'), ["policy='fifo'", 'sarathi, vllm, orca']),
  (dict(token_budget=3), ['token_budget=3', 'max_num_seqs=4']),
  (dict(num_pages=2, max_model_len=32), ['max_model_len=32', '4 pages']),
])
def test_a_configuration_that_cant_work_is_refused(make_llm, params, fields,
                                                   words):
  with pytest.raises(errors.ConfigError) as caught:
    make_llm(params, **fields)
  for word in words:
    assert word in str(caught.value)


def test_a_model_without_a_tokenizer_takes_token_ids(make_llm, params, greedy):
  llm = make_llm(params, tokenizer=None)
  done = llm.generate(PROMPTS, GREEDY)
  assert tokens_of(done) == greedy['old']
  assert done[0].text == ''
  with pytest.raises(errors.UnsupportedError, match='no tokenizer'):
    llm.generate('text')


def test_sampling_that_nobody_gave_is_what_the_makers_recommend(
    make_llm, params, greedy):
  recommended = dict(temperature=0.0, max_tokens=6)
  llm = make_llm(params, default_sampling=recommended)
  assert tokens_of(llm.generate(PROMPTS)) == greedy['old']
  with pytest.raises(errors.InvalidRequestError, match='temperature=-1'):
    make_llm(params, default_sampling=dict(temperature=-1))


def test_a_compilation_cache_that_cant_be_made(params, tmp_path):
  (tmp_path / 'file').touch()
  with pytest.raises(errors.ConfigError,
                     match=r'compilation_cache_dir=.*Not a directory'):
    llm_lib.LLM(tiny.MODEL, params, config=tiny.engine_config(
      compilation_cache_dir=str(tmp_path / 'file' / 'compiled')))


def test_steps_compiled_before_are_found_again(cache_dir, shared_llm):
  """Though this process had compiled other things before there was a cache."""
  assert any(name.startswith('jit_run-') for name in os.listdir(cache_dir))


_EIGHT_DEVICES = '''
import jax
import numpy as np
from sarathi_jax import errors, llm
from tests import source_tree
from tests import tiny
assert len(jax.devices()) == 8
mesh = jax.sharding.Mesh(np.array(jax.devices()), ('tp',))
spec = jax.sharding.PartitionSpec
whole = tiny.make_params()
split = {**whole, 'final_norm': jax.device_put(
  whole['final_norm'], jax.sharding.NamedSharding(mesh, spec('tp')))}
apart = {**whole, 'final_norm': jax.device_put(
  whole['final_norm'], jax.devices()[3])}
there = jax.device_put(whole, jax.devices()[5])
def refuse(params, **fields):
  try:
    llm.LLM(tiny.MODEL, params, config=tiny.engine_config(), **fields)
  except errors.ConfigError as error:
    print(error)
refuse(split)
refuse(apart)
refuse(whole, mesh=mesh)
one = llm.LLM(tiny.MODEL, there, config=tiny.engine_config(token_budget=4))
print('runs on', one._runner._kv[0][0].devices())
print(len(one.generate([1, 2, 3])[0].token_ids))
try:
  one.update_params(whole)
except errors.ConfigError as error:
  print(error)
'''


def test_several_devices_are_refused_by_name():
  env = dict(os.environ, JAX_PLATFORMS='cpu',
             XLA_FLAGS='--xla_force_host_platform_device_count=8')
  done = subprocess.run(
    [sys.executable, '-c', _EIGHT_DEVICES], env=env, capture_output=True,
    text=True, check=False, cwd=source_tree.ROOT)
  assert done.returncode == 0, done.stderr
  lines = done.stdout.splitlines()
  assert 'params.final_norm.scale: is on 8 devices; must be on one' in lines[0]
  assert 'params.final_norm.scale: is on cpu:3; must be on cpu:0' in lines[1]
  assert lines[2].startswith('mesh=') and 'one device' in lines[2]
  assert lines[3] == 'runs on {CpuDevice(id=5)}'
  assert lines[4] == '16'
  assert 'must be on cpu:5' in lines[5]


def test_the_public_names():
  assert sarathi_jax.LLM is llm_lib.LLM
  assert sarathi_jax.SamplingParams is types.SamplingParams
