# SPDX-License-Identifier: Apache-2.0
"""tunix's configs and trees, by descriptions of them: tunix is not needed."""

from __future__ import annotations

import dataclasses
import enum
import importlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sarathi_jax import errors
from sarathi_jax import models
from sarathi_jax.in_process import layouts
from sarathi_jax.in_process import trees
from sarathi_jax.integrations import tunix_models
from sarathi_jax.models import config as config_lib
from sarathi_jax.models import tree as tree_lib
from sarathi_jax.runner import mesh as mesh_lib
from sarathi_jax.runner import placement
from sarathi_jax.runner import weights

D, F, V, N, K, H, E = 16, 24, 40, 4, 2, 8, 3
_SIZES = dict(
  num_layers=2,
  embed_dim=D,
  hidden_dim=F,
  num_heads=N,
  num_kv_heads=K,
  head_dim=H,
)
_USUAL = dict(vocab_size=V, rope_theta=5e5, norm_eps=1e-4, shd_config=None)
_DTYPES = dict(dtype=jnp.float32, param_dtype=jnp.float32)
_NORM = enum.Enum(
  'QueryPreAttentionNormalisation',
  'BY_ONE_OVER_SQRT_HEAD_DIM BY_ONE_OVER_SQRT_EMBED_DIM_DIV_NUM_HEADS',
)
_GEMMA3 = _SIZES | dict(
  num_embed=V,
  sliding_window_size=5,
  local_base_frequency=10_000,
  global_base_frequency=1_000_000,
  local_scale_factor=1.0,
  global_scale_factor=8.0,
  query_pre_attn_norm=_NORM.BY_ONE_OVER_SQRT_EMBED_DIM_DIV_NUM_HEADS,
  vision_config=None,
)
# Class of a model -> fields of its config.
CONFIGS = {
  'llama3.Llama3': _SIZES | _USUAL | dict(weight_tying=False),
  'qwen2.Qwen2': _SIZES | _USUAL | _DTYPES | dict(use_tied_embedding=True),
  'qwen3.Qwen3': _SIZES
  | _USUAL
  | _DTYPES
  | dict(use_tied_embedding=False, num_experts=None, num_experts_per_tok=None),
  'qwen3.Qwen3 ': _SIZES
  | _USUAL
  | _DTYPES
  | dict(use_tied_embedding=True, num_experts=E, num_experts_per_tok=2),
  'gemma3.Gemma3': _GEMMA3,
  'gemma3.Gemma3 ': _GEMMA3 | dict(num_kv_heads=N),
}
_EMBED = {'embedder.input_embedding': (V, D)}
_LLAMA = {
  'input_layernorm.w': (D,),
  'post_attention_layernorm.w': (D,),
  'attn.q_proj.w': (D, N, H),
  'attn.k_proj.w': (D, K, H),
  'attn.v_proj.w': (D, K, H),
  'attn.o_proj.w': (N, H, D),
}
_MLP = {
  'mlp.gate_proj.kernel': (D, F),
  'mlp.up_proj.kernel': (D, F),
  'mlp.down_proj.kernel': (F, D),
}
_HEAD = {'lm_head.w': (D, V)}
_NORMS = {'attn.q_norm.w': (H,), 'attn.k_norm.w': (H,)}
_GEMMA = {
  'pre_attention_norm.scale': (D,),
  'post_attention_norm.scale': (D,),
  'pre_ffw_norm.scale': (D,),
  'post_ffw_norm.scale': (D,),
  'attn._query_norm.scale': (H,),
  'attn._key_norm.scale': (H,),
  'attn.attn_vec_einsum.w': (N, H, D),
}
# What its tree has: of all, and of each layer.
TREES = {
  'llama3.Llama3': (
    _EMBED | _HEAD | {'final_norm.w': (D,)},
    _LLAMA | _MLP,
  ),
  'qwen2.Qwen2': (
    _EMBED | {'final_norm.w': (D,)},
    _LLAMA
    | _MLP
    | {
      'attn.q_bias': (N * H,),
      'attn.k_bias': (K * H,),
      'attn.v_bias': (K * H,),
    },
  ),
  'qwen3.Qwen3': (
    _EMBED | _HEAD | {'final_norm.w': (D,)},
    _LLAMA | _MLP | _NORMS,
  ),
  'qwen3.Qwen3 ': (
    _EMBED | {'final_norm.w': (D,)},
    _LLAMA
    | _NORMS
    | {
      'mlp.router.kernel': (D, E),
      'mlp.gate_proj': (E, D, F),
      'mlp.up_proj': (E, D, F),
      'mlp.down_proj': (E, F, D),
    },
  ),
  'gemma3.Gemma3': (
    _EMBED | {'final_norm.scale': (D,)},
    _GEMMA
    | _MLP
    | {'attn.q_einsum.w': (N, D, H), 'attn.kv_einsum.w': (2, K, D, H)},
  ),
  'gemma3.Gemma3 ': (
    _EMBED | {'final_norm.scale': (D,)},
    _GEMMA | _MLP | {'attn.qkv_einsum.w': (3, N, D, H)},
  ),
}


def read(
  name: str, **fields: Any
) -> tuple[tunix_models.Family, config_lib.ModelConfig]:
  module, cls = name.split('.')
  made = type(cls.strip(), (), {'__module__': f'tunix.models.{module}.model'})
  family = tunix_models.family_of(type('Mine', (made,), {}))
  fields = CONFIGS[name] | fields
  config = dataclasses.make_dataclass('ModelConfig', fields)(**fields)
  return family, tunix_models.read_config(family, config, 64)


def shapes(name: str) -> dict[str, tuple[int, ...]]:
  of_all, of_layer = TREES[name]
  return of_all | {
    f'layers.{i}.{leaf}': shape
    for i in range(2)
    for leaf, shape in of_layer.items()
  }


def draw(name: str, dtype: Any = np.float32) -> dict[str, jax.Array]:
  rng = np.random.default_rng(0)
  return {
    leaf: jnp.asarray(rng.normal(size=shape), dtype)
    for leaf, shape in shapes(name).items()
  }


def converter(
  name: str, tp: int = 1, dtype: Any = jnp.float32
) -> tuple[trees.Converter, config_lib.ModelConfig]:
  _, model = read(name)
  mesh = mesh_lib.make(mesh_lib.parallel.Parallelism(tp=tp))
  leaves = layouts.LAYOUTS['tunix'].rows(model)
  return trees.Converter(model, leaves, mesh, dtype, 'Model'), model


@pytest.mark.parametrize('name', CONFIGS)
def test_a_tree_is_as_it_is_described(name):
  _, model = read(name)
  leaves = layouts.LAYOUTS['tunix'].rows(model)
  assert trees.shapes_of(model, leaves) == shapes(name)


# How ours lie in theirs, of each matrix of attention.
_LIES = {
  'q_proj.w': ('q', lambda w: w.reshape(D, N * H)),
  'k_proj.w': ('k', lambda w: w.reshape(D, K * H)),
  'v_proj.w': ('v', lambda w: w.reshape(D, K * H)),
  'o_proj.w': ('o', lambda w: w.reshape(N * H, D)),
  'attn_vec_einsum.w': ('o', lambda w: w.reshape(N * H, D)),
  'q_einsum.w': ('q', lambda w: np.concatenate(list(w), axis=1)),
  'kv_einsum.w': (
    'kv',
    lambda w: [np.concatenate(list(part), axis=1) for part in w],
  ),
  'qkv_einsum.w': (
    'qkv',
    lambda w: [np.concatenate(list(part), axis=1) for part in w],
  ),
}


@pytest.mark.parametrize('tp', [1, 2, 4])
@pytest.mark.parametrize('name', CONFIGS)
def test_matrices_of_heads_are_those_of_columns(name, tp):
  """And each device gets its own heads, nothing is moved any more."""
  convert, model = converter(name, tp)
  theirs = draw(name)
  params = convert(theirs)
  for leaf, (ours, made) in _LIES.items():
    if (w := theirs.get(f'layers.1.attn.{leaf}')) is not None:
      parts = made(np.asarray(w))
      for one, part in zip(
        ours, [parts] if len(ours) == 1 else parts, strict=True
      ):
        got = params['layers'][1]['attn'][one]
        np.testing.assert_array_equal(np.asarray(got), part)
  mesh = mesh_lib.make(mesh_lib.parallel.Parallelism(tp=tp))
  placed = weights.place_live(
    model, mesh, placement.of_live(jnp.float32), params
  )
  for was, now in zip(
    jax.tree.leaves(params), jax.tree.leaves(placed), strict=True
  ):
    if was.shape == now.shape and was.ndim > 1 and tp <= K:
      assert was.sharding.is_equivalent_to(now.sharding, was.ndim)


def test_what_lies_as_ours_is_served_as_it_is():
  convert, _ = converter('llama3.Llama3')
  theirs = draw('llama3.Llama3')
  params = convert(theirs)
  assert params['embed'] is theirs['embedder.input_embedding']
  assert (
    params['layers'][0]['mlp']['up'] is theirs['layers.0.mlp.up_proj.kernel']
  )
  again = convert(theirs)  # Of what was made, the first is gone.
  assert params['layers'][0]['attn']['q'].is_deleted()
  assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(again))
  assert not any(leaf.is_deleted() for leaf in theirs.values())


@pytest.mark.parametrize('axes', [(4, 1), (2, 2), (1, 4)])
def test_what_is_sharded_over_fsdp_is_gathered(axes):
  """And the trainer's arrays stay alive, whatever becomes of ours."""
  name = 'qwen3.Qwen3'
  mesh = jax.make_mesh(axes, ('fsdp', 'tp'))
  theirs = {
    leaf: jax.device_put(
      x,
      jax.sharding.NamedSharding(
        mesh,
        jax.sharding.PartitionSpec(
          *(
            axis if size % mesh.shape[axis] == 0 else None
            for axis, size in zip(('fsdp', 'tp'), x.shape, strict=False)
          )
        ),
      ),
    )
    for leaf, x in draw(name).items()
  }
  whole, _ = converter(name)
  for tp in (1, 2, 4):
    convert, _ = converter(name, tp)
    for _ in range(2):
      params = convert(theirs)
      for ours, expected in zip(
        jax.tree.leaves(params), jax.tree.leaves(whole(draw(name))), strict=True
      ):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(expected))
    for leaf in jax.tree.leaves(params):
      leaf.delete()
    theirs = {
      leaf: x
      if not x.is_deleted()
      else jax.device_put(draw(name)[leaf], x.sharding)
      for leaf, x in theirs.items()
    }


def test_another_dtype_is_made():
  convert, _ = converter('llama3.Llama3', dtype=jnp.bfloat16)
  theirs = draw('llama3.Llama3')
  params = convert(theirs)
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype('bfloat16')}
  np.testing.assert_array_equal(
    params['embed'], theirs['embedder.input_embedding'].astype(jnp.bfloat16)
  )


def test_the_function_is_the_trainers():
  _, llama = read('llama3.Llama3')
  assert isinstance(llama, config_lib.LlamaConfig)
  assert llama.rope == config_lib.RopeConfig(theta=1e6)  # Not the config's.
  assert (llama.norm_eps, llama.max_position_embeddings) == (1e-4, 64)
  assert not llama.tie_word_embeddings
  _, qwen = read('qwen2.Qwen2')
  assert qwen.rope.theta == 5e5 and qwen.tie_word_embeddings
  _, moe = read('qwen3.Qwen3 ')
  assert isinstance(moe, config_lib.MixtralConfig)
  assert (moe.num_experts, moe.experts_per_token) == (E, 2)
  _, gemma = read('gemma3.Gemma3', num_layers=7)
  assert isinstance(gemma, config_lib.LlamaConfig)
  assert gemma.attention_scale == (D // N) ** -0.5
  kinds = [gemma.layer_kind(i) for i in range(7)]
  assert [kind.attention.window for kind in kinds] == [5] * 5 + [None, 5]
  assert kinds[5].rope.factor == 8 and kinds[0].rope.theta == 10_000


@pytest.mark.parametrize(
  ('name', 'fields', 'says'),
  [
    ('llama3.Llama3', dict(rope_scaling=8.0), r'config\.rope_scaling: is unkn'),
    ('gemma3.Gemma3', dict(vision_config=1), 'vision_config: .*text_only'),
    (
      'gemma3.Gemma3',
      dict(query_pre_attn_norm=enum.Enum('Norm', 'OTHER').OTHER),
      'query_pre_attn_norm=OTHER: must be one of BY_ONE',
    ),
    ('llama3.Llama3', dict(num_kv_heads=3), 'num_kv_heads=3: must divide'),
  ],
)
def test_a_config_that_is_not_served_is_refused(name, fields, says):
  with pytest.raises(errors.ConfigError, match=says):
    read(name, **fields)


def test_without_tunix_its_user_is_told_what_to_install(monkeypatch):
  name = 'sarathi_jax.integrations.tunix'
  monkeypatch.delitem(sys.modules, name, raising=False)
  monkeypatch.setitem(sys.modules, 'tunix', None)
  with pytest.raises(ImportError, match=r'pip install "sarathi-jax\[tunix\]"'):
    importlib.import_module(name)


def test_another_model_is_refused():
  with pytest.raises(errors.ConfigError, match=r'is a builtins\.dict; must be'):
    tunix_models.family_of(dict)


@pytest.mark.parametrize(
  ('change', 'says'),
  [
    (
      lambda p: p | {'layers.0.attn.q_proj.b': p['final_norm.w']},
      r'layers\.0\.attn\.q_proj\.b: unknown in a Model\. Known is params\.'
      r'layers\.0\.attn\.q_proj\.w',
    ),
    (
      lambda p: {k: v for k, v in p.items() if k != 'lm_head.w'},
      r'params\.lm_head\.w: missing in a Model',
    ),
    (
      lambda p: p | {'lm_head.w': p['embedder.input_embedding']},
      r'lm_head\.w: has the shape \[40, 16\]; must have \[16, 40\]',
    ),
    (
      lambda p: p | {'lm_head.w': np.zeros((D, V))},
      r'lm_head\.w: is a ndarray; must be a jax\.Array',
    ),
  ],
)
def test_a_tree_that_is_another_is_refused_and_nothing_is_deleted(change, says):
  convert, _ = converter('llama3.Llama3')
  theirs = draw('llama3.Llama3')
  params = convert(theirs)
  with pytest.raises(errors.ConfigError, match=says):
    convert(change(theirs))
  assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))
  donated = jnp.copy(theirs['lm_head.w'])
  donated.delete()
  with pytest.raises(errors.ConfigError, match='is deleted, or donated'):
    convert(theirs | {'lm_head.w': donated})


@pytest.mark.parametrize('name', CONFIGS)
def test_all_of_a_models_parameters_are_described(name):
  convert, model = converter(name)
  params = convert(draw(name))
  specs = tree_lib.named_leaves(models.param_specs(model))
  found = tree_lib.named_leaves(params)
  assert {k: v.shape for k, v in found.items()} == {
    k: v.shape for k, v in specs.items()
  }
