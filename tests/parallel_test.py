# SPDX-License-Identifier: Apache-2.0
"""The keystone on many devices: tokens do not depend on the mesh, either."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from sarathi_jax import config as config_lib
from sarathi_jax import models
from sarathi_jax.models import config as model_config_lib
from sarathi_jax.models import parallel
from sarathi_jax.runner import device_runner
from sarathi_jax.runner import mesh as mesh_lib
from sarathi_jax.runner import placement
from tests import naive

MAX_LEN = 64
MAX_SEQS = 8
PAGE_SIZE = 16
PLENTY, SCARCE = MAX_SEQS * MAX_LEN // PAGE_SIZE, 7
PROMPT_LENS = (1, 7, 8, 33, 16, 41)
_SIZES: dict[str, Any] = dict(
  vocab_size=97,
  hidden_size=32,
  intermediate_size=48,
  num_heads=8,
  head_dim=16,
  max_position_embeddings=MAX_LEN,
)

# Layers do not divide by the stages, nor the vocabulary by the devices.
MODELS: dict[str, model_config_lib.ModelConfig] = {
  'llama': model_config_lib.LlamaConfig(
    **_SIZES,
    num_layers=5,
    num_kv_heads=2,
    sliding_window=20,
    window_layers=(1, 4),
  ),
  'qwen': model_config_lib.LlamaConfig(
    **_SIZES,
    num_layers=3,
    num_kv_heads=4,
    qkv_bias=True,
    o_bias=True,
    mlp_bias=True,
    qk_norm=True,
    tie_word_embeddings=True,
  ),
  'mixtral': model_config_lib.MixtralConfig(
    **_SIZES, num_layers=3, num_kv_heads=4, num_experts=4, experts_per_token=2
  ),
  'falcon_7b': model_config_lib.FalconConfig(
    **_SIZES,
    num_layers=3,
    num_kv_heads=1,
    activation='gelu',
    tie_word_embeddings=True,
  ),
  'falcon_180b': model_config_lib.FalconConfig(
    **_SIZES, num_layers=3, num_kv_heads=4, activation='gelu', num_norms=2
  ),
  'falcon_sequential': model_config_lib.FalconConfig(
    **_SIZES,
    num_layers=3,
    num_kv_heads=2,
    activation='gelu',
    num_norms=2,
    parallel=False,
    bias=True,
  ),
}
# tp, pp. A push has each kind, and the largest.
MESHES = [
  (2, 1),
  (1, 2),
  (2, 2),
  (2, 4),
  *(
    pytest.param(tp, pp, marks=pytest.mark.slow)
    for tp, pp in ((4, 1), (4, 2), (1, 4))
  ),
]


@functools.cache
def make_params(name: str) -> Any:
  return models.init_params(
    MODELS[name], jax.random.key(0), jnp.float32, scale=0.3
  )


@functools.cache
def requests(adjusted: bool = False) -> Any:
  make = naive.make_adjusted if adjusted else naive.make_requests
  return make(_SIZES['vocab_size'], PROMPT_LENS)


@functools.cache
def expected(name: str, adjusted: bool = False) -> Any:
  recompute = naive.recompute(MODELS[name], make_params(name))
  return {r.request_id: recompute(r) for r in requests(adjusted)}


@functools.lru_cache(maxsize=1)
def make_runner(
  name: str,
  tp: int,
  pp: int,
  token_budget: int = MAX_SEQS,
  attention: str = 'xla',
  kv_cache_dtype: str = 'auto',
  transpose: bool = False,
) -> device_runner.DeviceRunner:
  """One program, or two, of 8 and 16 tokens, which meet in the pipeline."""
  model = MODELS[name]
  parallelism = parallel.Parallelism(tp=tp, pp=pp)
  parallelism.check(model)
  mesh = mesh_lib.make(parallelism)
  return device_runner.DeviceRunner(
    model,
    placement.place_live(model, mesh, make_params(name), transpose=transpose),
    mesh,
    config_lib.EngineConfig(
      token_budget=token_budget,
      max_num_seqs=MAX_SEQS,
      page_size=PAGE_SIZE,
      num_pages=PLENTY,
      attention=attention,
      kv_cache_dtype=kv_cache_dtype,
    ),
    lambda max_model_len: token_budget,
  )


def run(
  runner: device_runner.DeviceRunner,
  *,
  num_pages: int,
  look_ahead: bool,
  token_budget: int = MAX_SEQS,
  adjusted: bool = False,
) -> Any:
  return naive.run_engine(
    runner,
    requests(adjusted),
    vocab_size=_SIZES['vocab_size'],
    token_budget=token_budget,
    max_num_seqs=MAX_SEQS,
    max_model_len=MAX_LEN,
    page_size=PAGE_SIZE,
    num_pages=num_pages,
    look_ahead=look_ahead,
    num_stages=runner.num_stages,
  )


def check(
  name: str,
  runner: device_runner.DeviceRunner,
  *,
  num_pages: int,
  look_ahead: bool,
  token_budget: int = MAX_SEQS,
  adjusted: bool = False,
) -> None:
  got, stats = run(
    runner,
    num_pages=num_pages,
    look_ahead=look_ahead,
    token_budget=token_budget,
    adjusted=adjusted,
  )
  naive.assert_same(got, expected(name, adjusted))
  assert (stats.num_preemptions > 0) == (num_pages == SCARCE)


@pytest.mark.parametrize('adjusted', [False, True], ids=['plain', 'adjusted'])
@pytest.mark.parametrize(
  'num_pages,look_ahead,token_budget',
  [(PLENTY, True, 16), (SCARCE, True, 16), (SCARCE, False, 8)],
)
@pytest.mark.parametrize('tp,pp', MESHES)
def test_tokens_do_not_depend_on_the_mesh(
  tp, pp, num_pages, look_ahead, token_budget, adjusted
):
  check(
    'llama',
    make_runner('llama', tp, pp, 16),
    num_pages=num_pages,
    look_ahead=look_ahead,
    token_budget=token_budget,
    adjusted=adjusted,
  )


@pytest.mark.parametrize(
  ('tp', 'pp', 'transpose'),
  [pytest.param(4, 1, False, marks=pytest.mark.slow), (2, 2, True)],
)
@pytest.mark.parametrize('name', MODELS)
def test_every_family_runs_on_a_mesh(name, tp, pp, transpose):
  check(
    name,
    make_runner(name, tp, pp, transpose=transpose),
    num_pages=SCARCE,
    look_ahead=True,
  )


def test_the_kernel_runs_on_a_mesh():
  runner = make_runner('qwen', 2, 2, attention='pallas_triton')
  check('qwen', runner, num_pages=PLENTY, look_ahead=True)


def test_a_quantized_cache_is_shared_out():
  """Scales lie with their heads and pages."""
  alone, together = (
    run(
      make_runner('qwen', tp, pp, kv_cache_dtype='int8'),
      num_pages=PLENTY,
      look_ahead=True,
    )[0]
    for tp, pp in ((1, 1), (2, 2))
  )
  naive.assert_same(together, alone)


def test_a_part_that_is_wrong_is_noticed():
  """The negative control: one device's part of one layer of one stage."""
  runner = make_runner('qwen', 2, 2)
  leaves = list(runner._leaves)
  which = next(i for i, leaf in enumerate(leaves) if leaf.shape == (2, 32, 48))
  runner._leaves[which] = jax.device_put(
    leaves[which].at[1, 0, 47].add(1.0), leaves[which].sharding
  )
  try:
    with pytest.raises(AssertionError):
      check('qwen', runner, num_pages=PLENTY, look_ahead=True)
  finally:
    runner._leaves[:] = leaves
