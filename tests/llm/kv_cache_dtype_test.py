# SPDX-License-Identifier: Apache-2.0
"""A cache of one byte a number serves nearly the same, in half the memory."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.ragged_paged_attention import quantization
from sarathi_jax import config as config_lib
from sarathi_jax import errors
from sarathi_jax import llm as llm_lib
from sarathi_jax import models
from sarathi_jax import types
from sarathi_jax.runner import kv_cache
from tests import tiny
from tests.llm import common

SAMPLING = types.SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = [[5, 6, 7], list(range(20, 50)), [9] * 12]
# The mean error of a log-probability, of a model with rather wild weights.
TOLERANCES = {'float32': 1e-5, 'int8': 0.03, 'fp8': 0.1}


def error_of(llm: Any, params: Any) -> float:
  """How far log-probabilities are off those of the model without a cache."""
  found = []
  for prompt, done in zip(
    PROMPTS, llm.generate(PROMPTS, SAMPLING), strict=True
  ):
    tokens = jnp.array([*prompt, *done.token_ids], jnp.int32)
    want = np.asarray(common.all_logprobs(params, tokens))
    at = np.arange(len(prompt), len(tokens))
    want = want[at - 1, np.asarray(tokens)[at]]
    found.append(np.abs(np.asarray(done.logprobs) - want))
  return float(np.concatenate(found).mean())


def leaf_dtypes(llm: Any) -> set[str]:
  return {x.dtype.name for x in jax.tree.leaves(llm.engine._runner._state.kv)}


@pytest.mark.parametrize(
  ('name', 'stored'),
  [
    ('float32', {'float32'}),
    ('int8', {'int8', 'float32'}),
    ('fp8', {'uint8', 'float32'}),
  ],
)
def test_accuracy(make_llm, params, name: str, stored: set[str]) -> None:
  llm = make_llm(params, kv_cache_dtype=name, **tiny.STEPS_ALONE)
  assert leaf_dtypes(llm) == stored
  error = error_of(llm, params)
  assert error < TOLERANCES[name]
  if name != 'float32':  # It is quantized, and that can be seen.
    assert error > TOLERANCES['float32']


@pytest.mark.parametrize('name', ['int8', 'fp8'])
def test_wrong_scales_would_be_noticed(
  make_llm, params, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
  right = quantization.quantize

  def wrong(x: Any, dtype: Any) -> Any:
    q = right(x, dtype)
    return q._replace(scales=q.scales * 1.25)

  monkeypatch.setattr(quantization, 'quantize', wrong)
  llm = make_llm(
    params, kv_cache_dtype=name, token_budget=4, **tiny.STEPS_ALONE
  )
  assert error_of(llm, params) > TOLERANCES[name]


@pytest.mark.parametrize('name', ['int8', 'fp8'])
def test_chunks_and_batches_change_nothing(make_llm, params, name: str) -> None:
  """A token is rounded by itself, whatever it is computed with."""
  whole = make_llm(params, kv_cache_dtype=name, **tiny.STEPS_ALONE).generate(
    PROMPTS, SAMPLING
  )
  small = make_llm(
    params, kv_cache_dtype=name, token_budget=4, **tiny.STEPS_ALONE
  )
  alone = [small.generate([prompt], SAMPLING)[0] for prompt in PROMPTS]
  assert common.tokens_of(whole) == common.tokens_of(alone)


# A push has the kernel in an engine in the keystone, and with bytes by itself.
@pytest.mark.slow
@pytest.mark.parametrize('name', ['int8', 'fp8'])
def test_the_gpus_kernel_serves_the_same(name: str) -> None:
  """Interpreted, on a CPU; its heads are 16 wide at least.

  Two layers: the last one's attention is one of decodes only. Both dtypes are
  read by the same kernel, whose own tests have both.
  """
  model = dataclasses.replace(tiny.MODEL, head_dim=16, num_layers=2)
  params = models.init_params(model, jax.random.key(0), jnp.float32, scale=0.4)
  llms = [
    llm_lib.LLM(
      model,
      params,
      eos_token_ids=(),
      config=config_lib.EngineConfig(
        token_budget=2,  # a program of one size
        max_num_seqs=2,
        max_model_len=64,
        page_size=16,
        num_pages=16,
        kv_cache_dtype=name,
        attention=attention,
        **tiny.STEPS_ALONE,
      ),
    )
    for attention in ('xla', 'pallas_triton')
  ]
  xla, kernel = (llm.generate(PROMPTS[:2], SAMPLING) for llm in llms)
  assert common.tokens_of(xla) == common.tokens_of(kernel)
  for ours, theirs in zip(xla, kernel, strict=True):
    np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=2e-3)


@pytest.mark.parametrize(
  ('name', 'dtype', 'platform', 'expected'),
  [
    ('auto', jnp.bfloat16, 'gpu', 'bfloat16'),
    ('auto', jnp.bfloat16, 'cpu', 'float32'),
    ('bfloat16', jnp.float32, 'cpu', 'bfloat16'),
    ('int8', jnp.bfloat16, 'gpu', 'int8'),
    ('fp8', jnp.bfloat16, 'gpu', 'float8_e4m3fn'),
  ],
)
def test_dtypes(name: str, dtype: Any, platform: str, expected: str) -> None:
  assert kv_cache.choose_dtype(name, dtype, platform).name == expected


def test_unknown_dtypes_are_refused() -> None:
  with pytest.raises(
    errors.ConfigError, match="kv_cache_dtype='fp4': must be one of auto, float"
  ):
    config_lib.EngineConfig(kv_cache_dtype='fp4')


def test_pages_count_their_scales() -> None:
  """Worked by hand: keys and values of a head dim of 8, a scale each."""
  model = tiny.MODEL
  numbers = 2 * model.num_layers * model.num_kv_heads * 16
  assert kv_cache.page_bytes(model, 16, jnp.int8) == numbers * (
    model.head_dim + 4
  )
  assert kv_cache.page_bytes(model, 16, jnp.bfloat16) == numbers * (
    model.head_dim * 2
  )


def test_pages_beyond_int32_are_refused_or_left_out() -> None:
  big = config_lib.EngineConfig(num_pages=2**31, kv_cache_dtype='int8')
  with pytest.raises(
    errors.ConfigError, match=r'num_pages=2147483648: must be at most .* int8'
  ):
    kv_cache.choose_num_pages(tiny.MODEL, big, 64, jnp.int8, [None], 0)
  free = config_lib.EngineConfig(
    max_num_seqs=512, kv_cache_gib=1e9, kv_cache_dtype='int8'
  )
  found = kv_cache.choose_num_pages(
    tiny.MODEL, free, 2**31, jnp.int8, [None], 0
  )
  numbers = free.page_size * tiny.MODEL.num_kv_heads * tiny.MODEL.head_dim
  assert found == (2**31 - 1) // numbers
