# SPDX-License-Identifier: Apache-2.0
"""Devices that have whole experts say what those with columns of each say."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from sarathi_jax import LLM
from sarathi_jax import EngineConfig
from sarathi_jax import SamplingParams
from sarathi_jax import errors
from sarathi_jax import models
from sarathi_jax.models import config as config_lib
from sarathi_jax.models import parallel
from sarathi_jax.runner import mesh as mesh_lib
from sarathi_jax.runner import placement
from tests import tiny

SIZES = dict(
  vocab_size=64,
  hidden_size=32,
  intermediate_size=24,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  max_position_embeddings=64,
)
MIXTURE = config_lib.MixtralConfig(
  **SIZES, num_experts=8, experts_per_token=3, qk_norm=True
)
PROMPTS = [[1, 2, 3, 4, 5], [9, 8], [7] * 11]


def texts(tp: int, **options: bool) -> list[tuple[int, ...]]:
  llm = LLM(
    MIXTURE,
    models.init_params(MIXTURE, jax.random.key(0), jnp.float32, scale=0.3),
    eos_token_ids=(),
    config=EngineConfig(
      tp=tp,
      token_budget=4,  # a program of one size
      max_num_seqs=4,
      page_size=8,
      num_pages=32,
      **tiny.STEPS_ALONE,
      **options,
    ),
  )
  done = llm.generate(
    PROMPTS, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
  )
  return [tuple(d.token_ids) for d in done]


def test_the_same_tokens_as_by_columns_and_on_one_device() -> None:
  alone = texts(1)
  assert texts(1, expert_parallel=True) == alone
  assert texts(2) == alone
  assert texts(2, expert_parallel=True) == alone


def test_each_device_has_its_own_experts() -> None:
  model = MIXTURE.divided(EngineConfig(expert_parallel=True))
  mesh = mesh_lib.make(parallel.Parallelism(tp=2))
  shapes = placement.shapes(model, mesh, placement.of_live(jnp.float32))
  for name, shape in (('gate', (4, 32, 24)), ('down', (4, 24, 32))):
    leaf = shapes['layers'][0]['moe'][name]
    assert leaf.sharding.shard_shape(leaf.shape) == shape


def test_what_can_not_be_so_divided_is_refused() -> None:
  dense = config_lib.LlamaConfig(**SIZES)
  with pytest.raises(errors.ConfigError, match='this model is dense'):
    dense.divided(EngineConfig(expert_parallel=True))
  with pytest.raises(errors.ConfigError, match='num_experts=6'):
    parallel.Parallelism(tp=4).check(
      config_lib.MixtralConfig(
        **SIZES, num_experts=6, experts_per_token=2, whole_experts=True
      )
    )
  # Columns need not be divisible then.
  few = config_lib.MixtralConfig(
    **(SIZES | {'intermediate_size': 3}),
    num_experts=8,
    experts_per_token=3,
  )
  with pytest.raises(errors.ConfigError, match='intermediate_size=3'):
    parallel.Parallelism(tp=2).check(few)
  parallel.Parallelism(tp=2).check(
    few.divided(EngineConfig(expert_parallel=True))
  )


def test_stages_have_dense_layers_at_the_same_places() -> None:
  sizes = SIZES | {'num_layers': 4}

  def check(pp: int, *dense: int) -> None:
    model = config_lib.MixtralConfig(
      **sizes,
      num_experts=4,
      experts_per_token=2,
      dense_sizes=(16,) * len(dense),
      dense_layers=dense,
    )
    parallel.Parallelism(pp=pp).check(model)

  check(2, 0, 2)
  check(1, 0, 3)
  with pytest.raises(errors.ConfigError, match='pp=2: puts layers 0, 2 at'):
    check(2, 0, 3)
  with pytest.raises(errors.ConfigError, match='pp=4: puts layers 0, 1, 2, 3'):
    check(4, 0, 2)
