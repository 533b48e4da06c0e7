# SPDX-License-Identifier: Apache-2.0
"""Facts of models are what their parameters and their caches say."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import attention_work
from sarathi_jax import models
from sarathi_jax.models import config as config_lib
from sarathi_jax.models import facts
from sarathi_jax.models import parallel
from sarathi_jax.models import published
from sarathi_jax.models import quantization
from sarathi_jax.runner import kv_cache

TINY = dict(
  vocab_size=16,
  hidden_size=24,
  intermediate_size=40,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=6,
  max_position_embeddings=16,
)
MODELS: dict[str, config_lib.ModelConfig] = {
  **{
    name: dataclasses.replace(model, quantization=None)
    for name, model in published.MODELS.items()
  },
  'whole experts': dataclasses.replace(
    published.MODELS['qwen3-30b-a3b'], whole_experts=True
  ),
  'biases': config_lib.LlamaConfig(**TINY, qkv_bias=True, mlp_bias=True),
  'sequential': config_lib.FalconConfig(
    **TINY, parallel=False, num_norms=2, bias=True
  ),
}


def test_every_family_is_here() -> None:
  assert {model.family for model in MODELS.values()} == set(models.FAMILIES)


@pytest.mark.parametrize('name', MODELS)
def test_matrices_are_those_of_the_parameters(name: str) -> None:
  model = MODELS[name]
  layers = models.param_specs(model)['layers']
  for i in _one_of_each_kind(model):
    assert facts.layer_size(model, i) == sum(
      math.prod(leaf.shape)
      for leaf in jax.tree.leaves(layers[i])
      if leaf.is_factor
    )


def _one_of_each_kind(model: config_lib.ModelConfig) -> set[int]:
  return {0, max(model.num_dense - 1, 0), model.num_dense, model.num_layers - 1}


@pytest.mark.parametrize(
  ('name', 'tp'),
  [
    ('llama-3.1-70b', 4),
    ('falcon-180b', 8),
    ('mixtral-8x7b', 2),
    ('whole experts', 4),
    ('glm-4.5', 8),
    ('qwen2-57b-a14b', 2),
  ],
)
def test_devices_share_matrices(name: str, tp: int) -> None:
  model, parallelism = MODELS[name], parallel.Parallelism(tp=tp)
  layers = models.param_specs(model)['layers']
  for i in _one_of_each_kind(model):
    assert facts.layer_size(model, i, tp) == sum(
      math.prod(map(parallelism.part_len, leaf.axes, leaf.shape))
      for leaf in jax.tree.leaves(layers[i])
      if leaf.is_factor
    )


@pytest.mark.parametrize(
  ('codes', 'group', 'zeros'),
  [
    ('int8', None, False),
    ('int8', 128, False),
    ('int4', 128, True),
    ('mxfp4', 32, False),
  ],
)
@pytest.mark.parametrize(
  ('name', 'tp', 'layer'),
  [
    ('llama-3.1-70b', 4, 0),
    ('llama-3.1-70b', 4, 1),
    ('falcon-180b', 8, 0),
    ('mixtral-8x7b', 2, 0),
  ],
)
def test_quantized_matrices_weigh_what_their_arrays_do(
  name: str, tp: int, layer: int, codes: str, group: int | None, zeros: bool
) -> None:
  kept = ('layers.1.attn.v', 'layers.1.*.down', *quantization.ROUTERS)
  model = dataclasses.replace(
    MODELS[name],
    quantization=quantization.Quantization(
      codes=codes, group=group, zeros=zeros, kept=kept
    ),
  )
  parallelism = parallel.Parallelism(tp=tp)
  specs = models.param_specs(model)['layers'][layer]
  assert facts.layer_bytes(model, layer, 2, tp) == pytest.approx(
    sum(
      math.prod(map(parallelism.part_len, leaf.axes, leaf.shape))
      * (jnp.dtype(leaf.dtype).itemsize if leaf.dtype else 2)
      for leaf in jax.tree.leaves(specs)
      if leaf.is_factor or leaf.dtype
    )
  )


def test_gpt_oss_weighs_what_its_files_do() -> None:
  """12.8 and 60.8 GiB, says its card, of which most is experts in 4.25 bits."""
  for name, gibibytes in (('gpt-oss-20b', 12.8), ('gpt-oss-120b', 60.8)):
    specs = models.param_specs(published.MODELS[name])
    total = sum(
      math.prod(leaf.shape) * jnp.dtype(leaf.dtype or 'bfloat16').itemsize
      for leaf in jax.tree.leaves(specs)
    )
    assert total / 2**30 == pytest.approx(gibibytes, abs=0.05)


def test_each_token_goes_through_some_of_the_experts() -> None:
  model = published.MODELS['mixtral-8x7b']
  assert [(m.copies, m.used) for m in facts.layer_matrices(model, 0)] == [
    (1, 1),
    (1, 1),
    (1, 1),
    (8, 2),
    (8, 2),
  ]


def test_few_tokens_read_few_of_the_experts() -> None:
  """On average over all choices: 2 of 8 by one, then of the others."""
  expert = facts.layer_matrices(published.MODELS['mixtral-8x7b'], 0)[-1]
  found = [expert.num_read(n) for n in (0, 1, 2, 1000)]
  assert found == pytest.approx([0, 2, 2 + 2 * 6 / 8, 8])


@pytest.mark.parametrize('dtype', attention_work.NUMBER_BYTES)
def test_keys_and_values_are_those_of_the_cache(dtype: str) -> None:
  model = published.MODELS['mistral-7b']
  assert kv_cache.page_bytes(model, 16, jnp.dtype(dtype)) == (
    16
    * model.num_layers
    * attention_work.token_bytes(model.num_kv_heads, model.head_dim, dtype)
  )


@pytest.mark.parametrize(
  ('before', 'tokens', 'window', 'pairs', 'keys'),
  [
    (3, 2, None, 9, 5),
    (3, 2, 4, 8, 5),
    (3, 2, 2, 4, 3),
    (7, 1, 3, 3, 3),
    (0, 4, None, 10, 4),
    (5, 0, None, 0, 0),
    (5, 0, 3, 0, 0),
  ],
)
def test_pairs_are_counted(
  before: int, tokens: int, window: int | None, pairs: int, keys: int
) -> None:
  assert attention_work.num_pairs(before, tokens, window) == pairs
  assert attention_work.num_keys(before, tokens, window) == keys
