# SPDX-License-Identifier: Apache-2.0
"""Weights in the layouts of others' models, of trees that are built by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

from flax import linen
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sarathi_jax import errors
from sarathi_jax import llm as llm_lib
from sarathi_jax import models
from sarathi_jax.in_process import layouts
from sarathi_jax.in_process import live
from sarathi_jax.models import config as model_config_lib
from sarathi_jax.models import tree as tree_lib
from sarathi_jax.runner import mesh as mesh_lib
from tests import tiny
from tests.llm import common

GREEDY, PROMPTS = common.GREEDY, common.PROMPTS
D, F, V, N, K, H, L = 16, 24, 300, 2, 1, 16, 2  # The root of H is a power of 2.
MODEL = model_config_lib.LlamaConfig(
  vocab_size=V,
  hidden_size=D,
  intermediate_size=F,
  num_layers=L,
  num_heads=N,
  num_kv_heads=K,
  head_dim=H,
  max_position_embeddings=64,
)
Leaves = Mapping[str, np.ndarray]  # by the names of ours
_MODULES = {  # ours -> Hugging Face's
  'attn.q': 'self_attn.q_proj',
  'attn.k': 'self_attn.k_proj',
  'attn.v': 'self_attn.v_proj',
  'attn.o': 'self_attn.o_proj',
  'mlp.gate': 'mlp.gate_proj',
  'mlp.up': 'mlp.up_proj',
  'mlp.down': 'mlp.down_proj',
  'attn_norm.scale': 'input_layernorm',
  'mlp_norm.scale': 'post_attention_layernorm',
}


def draw(seed: int = 0, model: Any = MODEL) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(seed)
  return {
    name: ((leaf.init == 'scale') + rng.normal(0, 0.4, leaf.shape)).astype(
      np.float32
    )
    for name, leaf in tree_lib.named_leaves(models.param_specs(model)).items()
  }


def ours(leaves: Leaves, model: Any = MODEL) -> Any:
  return tree_lib.with_leaves(
    models.param_specs(model), {n: jnp.asarray(x) for n, x in leaves.items()}
  )


def nested(flat: Mapping[str, Any], box: Callable[..., Any]) -> dict[str, Any]:
  """Returns a tree of dicts of arrays, each in a box."""
  root: dict[str, Any] = {}
  for name, array in flat.items():
    *path, last = name.split('.')
    node = root
    for key in path:
      node = node.setdefault(key, {})
    node[last] = box(jnp.asarray(array))
  return root


def layer_of(name: str) -> tuple[str, str]:
  """Returns the number and the rest of a name of a layer's."""
  _, number, rest = name.split('.', 2)
  return number, rest


def hugging_face(
  leaves: Leaves, layers: str, norm: str, matrix: str, *, turn: bool = False
) -> dict[str, np.ndarray]:
  embedding = 'weight' if turn else 'embedding'
  flat = {}
  for name, x in leaves.items():
    if name == 'embed':
      flat[f'model.embed_tokens.{embedding}'] = x
    elif name == 'final_norm.scale':
      flat[f'model.norm.{norm}'] = x
    elif name == 'lm_head':
      flat[f'lm_head.{matrix}'] = x.T if turn else x
    else:
      number, rest = layer_of(name)
      kind = norm if rest.endswith('scale') else matrix
      layer = layers.format(number)
      flat[f'model.{layer}.{_MODULES[rest]}.{kind}'] = x.T if turn else x
  return flat


def of_nnx(leaves: Leaves) -> Any:
  flat = hugging_face(leaves, 'layers.{}', 'scale', 'kernel')
  return nnx.State(nested(flat, nnx.Param))


def of_linen(leaves: Leaves) -> Any:
  flat = hugging_face(leaves, 'layers_{}', 'scale', 'kernel')
  boxes = nested(flat, lambda x: linen.Partitioned(x, (None,) * x.ndim))
  return {'params': boxes}


@jax.tree_util.register_pytree_with_keys_class
class Module:
  """As Equinox's: its attributes are its children."""

  def __init__(self, **fields: Any) -> None:
    self.fields = fields

  def tree_flatten_with_keys(self) -> Any:
    keys = [jax.tree_util.GetAttrKey(name) for name in self.fields]
    return list(zip(keys, self.fields.values(), strict=True)), None

  @classmethod
  def tree_unflatten(cls, aux: Any, children: Any) -> Module:
    raise NotImplementedError


def of_equinox(leaves: Leaves) -> Any:
  flat = hugging_face(leaves, 'layers.{}', 'weight', 'weight', turn=True)

  def module(tree: Any) -> Any:
    if not isinstance(tree, dict):
      return tree
    if '0' in tree:
      return [module(tree[str(i)]) for i in range(len(tree))]
    return Module(**{name: module(inner) for name, inner in tree.items()})

  return module(nested(flat, lambda x: x))


def stacked(leaves: Leaves, axis: int) -> dict[str, np.ndarray]:
  """Returns the layers' arrays by what is behind their numbers."""
  found: dict[str, list[np.ndarray]] = {}
  for name, x in leaves.items():
    if name.startswith('layers.'):
      found.setdefault(layer_of(name)[1], []).append(x)
  return {rest: np.stack(xs, axis) for rest, xs in found.items()}


def of_stacked(leaves: Leaves) -> Any:
  flat = {f'layers.{rest}': x for rest, x in stacked(leaves, 0).items()}
  whole = {n: x for n, x in leaves.items() if not n.startswith('layers.')}
  return nested(flat | whole, lambda x: x)


def maxtext(leaves: Leaves) -> dict[str, np.ndarray]:
  """The tree of MaxText's code; its query has 1 / sqrt(H)."""
  of = stacked(leaves, 1)
  return {
    'token_embedder.embedding': leaves['embed'],
    'decoder.decoder_norm.scale': leaves['final_norm.scale'],
    'decoder.logits_dense.kernel': leaves['lm_head'],
  } | {
    f'decoder.layers.{name}': x
    for name, x in {
      'self_attention.query.kernel': (
        of['attn.q'].reshape(D, L, N, H) / np.float32(np.sqrt(H))
      ),
      'self_attention.key.kernel': of['attn.k'].reshape(D, L, K, H),
      'self_attention.value.kernel': of['attn.v'].reshape(D, L, K, H),
      'self_attention.out.kernel': (
        of['attn.o'].reshape(N, H, L, D).transpose(0, 2, 1, 3)
      ),
      'mlp.wi_0.kernel': of['mlp.gate'],
      'mlp.wi_1.kernel': of['mlp.up'],
      'mlp.wo.kernel': of['mlp.down'],
      'pre_self_attention_layer_norm.scale': of['attn_norm.scale'],
      'post_self_attention_layer_norm.scale': of['mlp_norm.scale'],
    }.items()
  }


def of_maxtext(leaves: Leaves) -> Any:
  return {'params': {'params': nested(maxtext(leaves), lambda x: x)}}


def of_tunix(leaves: Leaves) -> Any:
  heads = {'q_proj': (D, N, H), 'k_proj': (D, K, H), 'v_proj': (D, K, H)}
  flat = {}
  for name, x in leaves.items():
    if not name.startswith('layers.'):
      flat |= {
        'embed': {'embedder.input_embedding': x},
        'final_norm.scale': {'final_norm.w': x},
        'lm_head': {'lm_head.w': x},
      }[name]
      continue
    number, rest = layer_of(name)
    module = _MODULES[rest].replace('self_attn', 'attn')
    last = module.rpartition('.')[2]
    kind = 'kernel' if 'mlp.' in module else 'w'
    shape = (N, H, D) if last == 'o_proj' else heads.get(last, x.shape)
    flat[f'layers.{number}.{module}.{kind}'] = x.reshape(shape)
  return nnx.State(nested(flat, nnx.Param))


TABLE = [  # Somebody's own.
  layouts.Leaf('embed', 'wte', 'vd'),
  layouts.Leaf('final_norm.scale', 'norm', 'd'),
  layouts.Leaf('lm_head', 'head', 'vd->d v'),
  layouts.Leaf('layers.{}.attn.q', 'h.{}.qkv', '0dq->d q'),
  layouts.Leaf('layers.{}.attn.k', 'h.{}.kv', '0dr->d r'),
  layouts.Leaf('layers.{}.attn.v', 'h.{}.kv', '1dr->d r'),
  layouts.Leaf('layers.{}.attn.o', 'h.{}.o', 'qd'),
  *(
    layouts.Leaf(f'layers.{{}}.{name}', f'h.{name}', f'l{axes}')
    for name, axes in {
      'mlp.gate': 'df',
      'mlp.up': 'df',
      'mlp.down': 'fd',
      'attn_norm.scale': 'd',
      'mlp_norm.scale': 'd',
    }.items()
  ),
]


def of_table(leaves: Leaves) -> Any:
  of = stacked(leaves, 0)
  flat = {
    'wte': leaves['embed'],
    'norm': leaves['final_norm.scale'],
    'head': leaves['lm_head'].T,
  }
  for i in range(L):
    layer = f'layers.{i}.attn'
    flat[f'h.{i}.qkv'] = leaves[f'{layer}.q'][None]
    flat[f'h.{i}.kv'] = np.stack([leaves[f'{layer}.{x}'] for x in 'kv'])
    flat[f'h.{i}.o'] = leaves[f'{layer}.o']
  inner = {n: x for n, x in of.items() if not n.startswith('attn.')}
  return nested(flat | {f'h.{n}': x for n, x in inner.items()}, lambda x: x)


MADE: Mapping[str, tuple[Any, Callable[[Leaves], Any]]] = {
  'plain': ('plain', lambda leaves: {'params': nested(leaves, nnx.Param)}),
  'stacked': ('stacked', of_stacked),
  'nnx': ('nnx', of_nnx),
  'linen': ('linen', of_linen),
  'equinox': ('equinox', of_equinox),
  'maxtext': ('maxtext', of_maxtext),
  'tunix': ('tunix', of_tunix),
  'a table': (TABLE, of_table),
}


def test_all_layouts_are_tested() -> None:
  assert set(layouts.LAYOUTS) == set(MADE) - {'a table'}


def make_llm(params: Any, layout: Any, cache_dir: str) -> llm_lib.LLM:
  return llm_lib.LLM(
    MODEL,
    params,
    layout=layout,
    eos_token_ids=(),
    config=tiny.engine_config(
      token_budget=4,  # one program
      compilation_cache_dir=cache_dir,
      **tiny.STEPS_ALONE,
    ),
  )


@pytest.fixture(scope='module')
def expected(cache_dir) -> list[Any]:
  """The tokens and log-probabilities of either weights, in our layout."""
  llm = make_llm(ours(draw()), None, cache_dir)
  found = []
  for seed in (0, 1):
    llm.update_params(ours(draw(seed)))
    found.append(told(llm))
  assert found[0][0] != found[1][0]
  return found


def told(llm: llm_lib.LLM) -> Any:
  done = llm.generate(PROMPTS, GREEDY)
  return [c.token_ids for c in done], np.array([c.logprobs for c in done])


def assert_told(llm: llm_lib.LLM, expected: Any) -> None:
  tokens, logprobs = told(llm)
  assert tokens == expected[0]
  np.testing.assert_allclose(logprobs, expected[1], atol=1e-5)


@pytest.mark.parametrize('name', MADE)
def test_the_same_tokens_come_out(name, expected, cache_dir):
  """At first, and after new weights, for which nothing is compiled."""
  layout, make = MADE[name]
  theirs = make(draw(0)), make(draw(1))
  llm = make_llm(theirs[0], layout, cache_dir)
  assert_told(llm, expected[0])
  llm.update_params(theirs[1])
  assert_told(llm, expected[1])
  with tiny.count_compiles() as compiled:
    llm.update_params(theirs[0])
  assert_told(llm, expected[0])
  assert compiled == []
  assert not any(
    leaf.is_deleted() for tree in theirs for leaf in jax.tree.leaves(tree)
  )


def test_what_lies_as_ours_is_not_copied():
  read = live.LiveParams(MODEL, 'nnx')
  theirs = of_nnx(draw())
  read.begin(mesh_lib.make(), jnp.float32)
  made = read.as_ours(read.read(theirs))
  assert {id(x) for x in jax.tree.leaves(made)} == {
    id(x) for x in jax.tree.leaves(theirs)
  }


@pytest.mark.parametrize('tp', [1, 2])
def test_layers_are_taken_out_of_a_trainers_shards(tp):
  """And of what was made of the last weights, nothing stays."""
  mesh = jax.make_mesh((2, 2), ('fsdp', 'tensor'))
  model = dataclasses.replace(MODEL, num_kv_heads=2)
  leaves = draw(0, model)

  def shard(x: jax.Array) -> jax.Array:
    axes = [
      axis if size % 2 == 0 else None
      for axis, size in zip(('fsdp', 'tensor', None), x.shape, strict=False)
    ]
    spec = jax.sharding.PartitionSpec(*axes)
    return jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))

  theirs = jax.tree.map(shard, of_stacked(leaves))
  read = live.LiveParams(model, 'stacked')
  read.begin(mesh_lib.make(mesh_lib.parallel.Parallelism(tp=tp)), jnp.bfloat16)
  first = read.as_ours(read.read(theirs))
  second = read.as_ours(read.read(theirs))
  for name, x in tree_lib.named_leaves(second).items():
    np.testing.assert_array_equal(x, leaves[name].astype(jnp.bfloat16))
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first))


def test_maxtext_rotates_neighbours_where_positions_are_scaled_as_llama3s():
  rope = model_config_lib.RopeConfig(
    kind='llama3',
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position=32,
  )
  model = dataclasses.replace(MODEL, rope=rope)
  leaves = draw()
  flat = maxtext(leaves)
  for name in ('query', 'key'):  # Pairs of ours are H / 2 apart.
    kernel = flat[f'decoder.layers.self_attention.{name}.kernel']
    halves = kernel.reshape(*kernel.shape[:3], 2, H // 2)
    flat[f'decoder.layers.self_attention.{name}.kernel'] = np.stack(
      [halves[..., 0, :], halves[..., 1, :]], -1
    ).reshape(kernel.shape)
  read = live.LiveParams(model, 'maxtext')
  assert read.model.attention_scale == 1
  read.begin(mesh_lib.make(), jnp.float32)
  made = read.as_ours(read.read(nested(flat, lambda x: x)))
  for name, x in tree_lib.named_leaves(made).items():
    scale = np.sqrt(H) if name.endswith('attn.q') else 1
    np.testing.assert_array_equal(np.asarray(x) * scale, leaves[name])


def test_norms_of_heads_and_biases_have_their_rows():
  model = dataclasses.replace(MODEL, qk_norm=True, qkv_bias=True)
  for name in ('nnx', 'linen', 'equinox', 'maxtext', 'tunix'):
    read = live.LiveParams(model, name)
    assert read.model.attention_scale is None  # It is normalized.
    rows = layouts.LAYOUTS[name].rows(model)
    shapes = layouts.trees.shapes_of(model, rows)
    assert sum('norm' in n and H in s for n, s in shapes.items()) >= 2
    assert sum(n.endswith('bias') for n in shapes) >= 3


@pytest.mark.parametrize(
  ('layout', 'change', 'says'),
  [
    (
      'nnx',
      lambda p: p | {'lm_heat': p['lm_head']},
      r'lm_heat\.kernel: unknown in a llama \(nnx\)\. Known is params\.lm_head',
    ),
    (
      'nnx',
      lambda p: {k: v for k, v in p.items() if k != 'lm_head'},
      r'params\.lm_head\.kernel: missing in a llama \(nnx\)',
    ),
    (
      'equinox',
      lambda p: p,
      r'weight: missing in a llama \(equinox\)\. Found is params\.embed',
    ),
    (
      'nnx',
      lambda p: p | {'model': {'lm_head': p['lm_head']}},
      r'lm_head\.kernel: there are two of lm_head\.kernel, inside and outside',
    ),
    ('pytorch', lambda p: p, "layout='pytorch': must be one of plain, stacked"),
    ([1], lambda p: p, r'layout=\[1\]: must be one of .*, a Layout, or a list'),
    (
      TABLE[1:],
      lambda p: p,
      r'layout: has no row for embed of a llama; it has final_norm\.scale',
    ),
    (
      [*TABLE[1:], layouts.Leaf('embed', 'wte', 'vd->dv')],
      lambda p: p,
      r"layout: 'vd->dv' of embed must make \[300, 16\]",
    ),
  ],
)
def test_what_a_table_does_not_know_is_an_error(layout, change, says):
  theirs = nested(
    hugging_face(draw(), 'layers.{}', 'scale', 'kernel'), lambda x: x
  )
  with pytest.raises(errors.ConfigError, match=says):
    live.LiveParams(MODEL, layout).read(change(theirs))


def test_a_dtype_is_asked_for_or_that_of_all():
  read = live.LiveParams(MODEL, 'nnx')
  theirs = of_nnx({n: x.astype(jnp.bfloat16) for n, x in draw().items()})
  leaves = read.read(theirs)
  assert read.dtype_of(leaves, None) == jnp.bfloat16
  assert read.dtype_of(leaves, jnp.float16) == jnp.float16
  mixed = read.read(of_nnx(draw() | {'embed': draw()['embed'].astype('half')}))
  with pytest.raises(errors.ConfigError, match='must be in one dtype'):
    read.dtype_of(mixed, None)
