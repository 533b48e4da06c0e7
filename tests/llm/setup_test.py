# SPDX-License-Identifier: Apache-2.0
"""LLMs that can, and that can not, be made."""

from __future__ import annotations

import os
import pathlib

import pytest

import sarathi_jax
from sarathi_jax import errors
from sarathi_jax import llm as llm_lib
from sarathi_jax import types
from tests import tiny
from tests.checkpoints_convert import fake_checkpoint
from tests.llm import common

GREEDY, PROMPTS = common.GREEDY, common.PROMPTS
tokens_of = common.tokens_of


@pytest.mark.parametrize(
  'fields,words',
  [
    (dict(max_model_len=65), ['max_model_len=65', 'at most 64']),
    (dict(policy='fifo'), ["policy='fifo'", 'sarathi, vllm, orca']),
    (dict(token_budget=3), ['token_budget=3', 'max_num_seqs=4']),
    (dict(num_pages=2, max_model_len=32), ['max_model_len=32', '4 pages']),
  ],
)
def test_a_configuration_that_cant_work_is_refused(
  make_llm, params, fields, words
):
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
  make_llm, params, greedy
):
  recommended = dict(temperature=0.0, max_tokens=6)
  llm = make_llm(params, default_sampling=recommended)
  assert tokens_of(llm.generate(PROMPTS)) == greedy['old']
  with (
    tiny.count_compiles() as compiled,
    pytest.raises(errors.InvalidRequestError, match='temperature=-1'),
  ):
    make_llm(params, default_sampling=dict(temperature=-1))
  assert 'jit(run)' not in compiled  # It was told before that.


def test_a_compilation_cache_that_cant_be_made(params, tmp_path):
  (tmp_path / 'file').touch()
  with pytest.raises(
    errors.ConfigError, match=r'compilation_cache_dir=.*Not a directory'
  ):
    llm_lib.LLM(
      tiny.MODEL,
      params,
      eos_token_ids=(),
      config=tiny.engine_config(
        compilation_cache_dir=str(tmp_path / 'file' / 'compiled')
      ),
    )


def test_steps_compiled_before_are_found_again(cache_dir, shared_llm):
  """Though this process had compiled other things before there was a cache."""
  assert any(name.startswith('jit_run-') for name in os.listdir(cache_dir))


def test_a_compilation_cache_may_be_a_path(params, cache_dir):
  llm_lib.LLM(
    tiny.MODEL,
    params,
    eos_token_ids=(),
    config=tiny.engine_config(compilation_cache_dir=pathlib.Path(cache_dir)),
  )
  with pytest.raises(errors.ConfigError, match='compilation_cache_dir=5: must'):
    tiny.engine_config(compilation_cache_dir=5)


def test_the_public_names():
  assert sarathi_jax.LLM is llm_lib.LLM
  assert sarathi_jax.SamplingParams is types.SamplingParams


def test_a_budget_that_follows_the_slo_changes_no_token(make_llm, params):
  llm = make_llm(params, tbt_slo_ms=10_000.0)
  assert llm.engine.pace.model.num_observed > 6  # warm
  done = llm.generate(PROMPTS, GREEDY)
  assert common.tokens_of(done) == common.tokens_of(
    make_llm(params).generate(PROMPTS, GREEDY)
  )
  assert llm.engine.stats().num_free_pages == llm.engine.stats().num_pages


def test_a_target_that_no_step_meets_is_refused(make_llm, params):
  with pytest.raises(errors.ConfigError, match='a step of a single decode'):
    make_llm(params, tbt_slo_ms=1e-6)
  with pytest.raises(errors.ConfigError, match='only sarathi has'):
    make_llm(params, tbt_slo_ms=50.0, policy='vllm')


def test_a_mesh_that_cant_be_is_told_before_anything_is_converted(tmp_path):
  source = fake_checkpoint.llama(tmp_path / 'hf')
  with pytest.raises(errors.ConfigError, match=r'tp=3: must divide'):
    llm_lib.LLM.from_checkpoint(
      source, config=tiny.engine_config(tp=3), cache_dir=tmp_path / 'cache'
    )
  assert not (tmp_path / 'cache').exists()
