# SPDX-License-Identifier: Apache-2.0
"""LLMs on a mesh of the caller's, with weights that may lie there already."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from sarathi_jax import errors
from sarathi_jax import llm as llm_lib
from sarathi_jax import models
from sarathi_jax.models import config as model_config_lib
from tests import tiny
from tests.llm import common

MODEL = model_config_lib.LlamaConfig(
  vocab_size=300,
  hidden_size=16,
  intermediate_size=24,
  num_layers=2,
  num_heads=2,
  num_kv_heads=2,
  head_dim=8,
  max_position_embeddings=64,
)
PROMPTS, GREEDY = common.PROMPTS, common.GREEDY
# A trainer's rules: names of a parameter's axes -> its mesh's.
RULES = {
  'heads': 'model',
  'kv_heads': 'model',
  'mlp': 'model',
  'vocab': 'model',
  'logits': 'model',
}


def params_of(seed: int) -> Any:
  return models.init_params(MODEL, jax.random.key(seed), jnp.float32, scale=0.4)


def mesh_of(shape: tuple[int, ...], names: tuple[str, ...]) -> Mesh:
  devices = np.array(jax.devices()[: int(np.prod(shape))])
  return Mesh(devices.reshape(shape), names)


def shard(params: Any, mesh: Mesh, rules: dict[str, str]) -> Any:
  return jax.tree.map(
    lambda leaf, spec: jax.device_put(
      leaf,
      NamedSharding(
        mesh, PartitionSpec(*(rules.get(name) for name in spec.axes))
      ),
    ),
    params,
    models.param_specs(MODEL),
  )


def make(
  params: Any,
  cache_dir: str,
  *,
  mesh: Mesh | None = None,
  axis_names: Any = None,
  **fields: Any,
) -> llm_lib.LLM:
  return llm_lib.LLM(
    MODEL,
    params,
    mesh=mesh,
    axis_names=axis_names,
    eos_token_ids=(),
    config=tiny.engine_config(
      token_budget=4,
      compilation_cache_dir=cache_dir,
      **tiny.STEPS_ALONE,
      **fields,
    ),
  )


def addresses(tree: Any) -> set[int]:
  return {
    shard.data.unsafe_buffer_pointer()
    for leaf in jax.tree.leaves(tree)
    for shard in leaf.addressable_shards
  }


@pytest.fixture(scope='module')
def greedy(cache_dir) -> list[Any]:
  """Tokens of two sets of weights, on one device."""
  prompts = [[1, 2, 3], [7] * 9]
  llm = make(params_of(0), cache_dir)
  old = common.tokens_of(llm.generate(prompts, GREEDY))
  llm.update_params(params_of(1))
  return [old, common.tokens_of(llm.generate(prompts, GREEDY))]


def tokens_of(llm: llm_lib.LLM) -> Any:
  return common.tokens_of(llm.generate([[1, 2, 3], [7] * 9], GREEDY))


def test_weights_that_lie_right_are_served_without_a_copy(cache_dir, greedy):
  mesh = mesh_of((1, 2), ('data', 'model'))
  params = shard(params_of(0), mesh, RULES)
  llm = make(params, cache_dir, mesh=mesh, axis_names={'tp': 'model'})
  assert addresses(llm._runner._leaves) == addresses(params)
  assert tokens_of(llm) == greedy[0]
  new_params = shard(params_of(1), mesh, RULES)
  with tiny.count_compiles() as compiled:
    llm.update_params(new_params)
    assert tokens_of(llm) == greedy[1]
  assert compiled == []
  assert addresses(llm._runner._leaves) == addresses(new_params)


@pytest.mark.parametrize(
  'axis_names,pp',
  [({'tp': ('data', 'model')}, 1), ({'pp': 'data', 'tp': 'model'}, 2)],
)
def test_weights_that_lie_otherwise_are_moved(cache_dir, axis_names, pp):
  """Of a trainer that spreads them over all its devices, as FSDP does."""
  model = model_config_lib.LlamaConfig(
    vocab_size=300,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=64,
  )
  params = models.init_params(model, jax.random.key(0), jnp.float32, scale=0.4)
  config = tiny.engine_config(
    token_budget=4, compilation_cache_dir=cache_dir, **tiny.STEPS_ALONE
  )
  expected = tokens_of(
    llm_lib.LLM(model, params, config=config, eos_token_ids=())
  )
  mesh = mesh_of((2, 2), ('data', 'model'))
  spread = jax.tree.map(
    lambda leaf: jax.device_put(
      leaf, NamedSharding(mesh, PartitionSpec(('data', 'model')))
    ),
    params,
  )
  llm = llm_lib.LLM(
    model,
    spread,
    mesh=mesh,
    axis_names=axis_names,
    config=config,
    eos_token_ids=(),
  )
  assert llm._runner.num_stages == pp
  assert tokens_of(llm) == expected
  with tiny.count_compiles() as compiled:
    llm.update_params(jax.tree.map(lambda leaf: leaf * 1, spread))
  assert [name for name in compiled if 'run' in name] == []
  assert tokens_of(llm) == expected


def test_a_trainers_mesh_of_fsdp_under_a_guard(cache_dir, greedy):
  """As tunix trains: rows over 'fsdp', no transfers; served over both axes."""
  mesh = mesh_of((2, 2), ('fsdp', 'tp'))

  def sharded(seed: int) -> Any:
    return jax.tree.map(
      lambda leaf: jax.device_put(
        leaf, NamedSharding(mesh, PartitionSpec('fsdp'))
      ),
      params_of(seed),
    )

  old, new = sharded(0), sharded(1)
  with jax.transfer_guard('disallow'):
    llm = make(old, cache_dir, mesh=mesh, axis_names={'pp': 'fsdp', 'tp': 'tp'})
    assert tokens_of(llm) == greedy[0]
    llm.update_params(new)
    assert tokens_of(llm) == greedy[1]


def test_one_device_runs_weights_where_they_are(cache_dir, greedy):
  device = jax.devices()[5]
  llm = make(jax.device_put(params_of(0), device), cache_dir)
  assert llm._runner._state.kv[0][0].devices() == {device}
  assert tokens_of(llm) == greedy[0]
  llm.update_params(params_of(1))  # These are on the first one.
  assert llm._runner._leaves[0].devices() == {device}
  assert tokens_of(llm) == greedy[1]


@pytest.mark.parametrize(
  'fields,words',
  [
    (
      dict(mesh=((2, 2), ('data', 'model')), axis_names={'tp': 'model'}),
      ["axis 'data'", 'axis_names'],
    ),
    (dict(mesh=((2,), ('model',))), ["axis 'model'", 'axis_names']),
    (
      dict(mesh=((2,), ('tp',)), axis_names={'tp': 'x'}),
      ["'x' must be an axis", 'tp'],
    ),
    (
      dict(mesh=((2,), ('tp',)), axis_names={'dp': 'tp'}),
      ["'dp' is neither 'pp' nor 'tp'"],
    ),
    (
      dict(mesh=((2,), ('tp',)), axis_names={'tp': ('tp', 'tp')}),
      ['named once'],
    ),
    (dict(axis_names={'tp': 'tp'}), ['axis_names', 'there is none']),
    (dict(mesh=((2,), ('tp',)), tp=4), ['(4, 1)', 'the mesh has tp=2, pp=1']),
    (dict(mesh=((4,), ('tp',))), ['tp=4', 'num_heads=2']),
    (dict(mesh=((4,), ('pp',))), ['pp=4', 'layers, 2']),
    (dict(tp=2, pp=8), ['pp=8', 'layers, 2']),
  ],
)
def test_a_mesh_that_cant_be_is_refused(cache_dir, fields, words):
  mesh = fields.get('mesh')
  with pytest.raises(errors.ConfigError) as caught:
    make(params_of(0), cache_dir, **{**fields, 'mesh': mesh and mesh_of(*mesh)})
  for word in words:
    assert word in str(caught.value)


def test_weights_on_many_devices_need_a_mesh(cache_dir):
  mesh = mesh_of((8,), ('x',))
  params = params_of(0)
  params['final_norm'] = jax.device_put(
    params['final_norm'], NamedSharding(mesh, PartitionSpec('x'))
  )
  with pytest.raises(errors.ConfigError, match=r'on 8 devices.*mesh'):
    make(params, cache_dir)


def test_too_few_devices(cache_dir):
  model = model_config_lib.LlamaConfig(
    vocab_size=300,
    hidden_size=16,
    intermediate_size=32,
    num_layers=2,
    num_heads=16,
    num_kv_heads=1,
    head_dim=8,
    max_position_embeddings=64,
  )
  with pytest.raises(errors.ConfigError, match=r'16 devices.*there are 8'):
    llm_lib.LLM(
      model,
      models.init_params(model, jax.random.key(0)),
      eos_token_ids=(),
      config=tiny.engine_config(tp=16),
    )
