# SPDX-License-Identifier: Apache-2.0
"""Forward passes under JAX's strict rules, in every dtype, and on shards."""

from __future__ import annotations

from collections.abc import Iterator
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import ragged_paged_attention as rpa
from sarathi_jax import models
from sarathi_jax.models import attention
from sarathi_jax.models import config as config_lib
from sarathi_jax.models import kinds
from sarathi_jax.models import layers
from sarathi_jax.models import moe
from sarathi_jax.models import rope
from sarathi_jax.models import router
from sarathi_jax.models import spec
from sarathi_jax.models import tree

_SIZES: dict[str, Any] = dict(
  vocab_size=50,
  hidden_size=32,
  intermediate_size=48,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  max_position_embeddings=64,
)

CONFIGS: dict[str, config_lib.ModelConfig] = {
  'llama': config_lib.LlamaConfig(**_SIZES),
  'llama_everything': config_lib.LlamaConfig(
    **_SIZES,
    qkv_bias=True,
    o_bias=True,
    mlp_bias=True,
    qk_norm=True,
    sliding_window=3,
    window_layers=(1,),
    tie_word_embeddings=True,
    rope=config_lib.RopeConfig(rotary_dim=4),
  ),
  'olmo': config_lib.LlamaConfig(
    **_SIZES,
    norms='after',
    qk_norm=True,
    qk_norm_is_wide=True,
    sliding_window=3,
    window_layers=(1,),
    window_rope=config_lib.RopeConfig(theta=500.0),
    unrotated_layers=(1,),
  ),
  'gemma': config_lib.LlamaConfig(
    **_SIZES,
    norms='around',
    norm_from_one=True,
    qk_norm=True,
    sliding_window=3,
    window_layers=(1,),
    window_rope=config_lib.RopeConfig(theta=500.0),
    embed_scale=4.0,
    attention_scale=0.3,
    attention_soft_cap=2.0,
    logit_soft_cap=5.0,
    activation='gelu_tanh',
    tie_word_embeddings=True,
  ),
  'granite': config_lib.LlamaConfig(
    **_SIZES,
    rope=config_lib.RopeConfig(
      kind='yarn',
      rotary_dim=4,
      factor=4.0,
      original_max_position=8,
      attention_factor=1.1,
      beta_fast=32.0,
      beta_slow=1.0,
      truncate=True,
    ),
    query_growth=0.5,
    embed_scale=3.0,
    residual_scale=0.5,
    logit_scale=2.0,
  ),
  'gpt_oss': config_lib.MixtralConfig(
    **_SIZES,
    num_experts=4,
    experts_per_token=2,
    router=config_lib.RouterConfig(bias=True),
    mlp_bias=True,
    gate_limit=0.5,
    activation='quick_gelu',
    attention_sinks=True,
  ),
  'mixtral': config_lib.MixtralConfig(
    **_SIZES, num_experts=4, experts_per_token=2
  ),
  'glm_moe': config_lib.MixtralConfig(
    **_SIZES,
    num_experts=6,
    experts_per_token=2,
    router=config_lib.RouterConfig(
      score='sigmoid', choice_bias=True, num_groups=3, top_groups=2, scale=2.5
    ),
    shared_size=16,
    dense_sizes=(40,),
  ),
  'falcon': config_lib.FalconConfig(**_SIZES, activation='gelu'),
  'falcon_sequential': config_lib.FalconConfig(
    **_SIZES, activation='gelu', bias=True, num_norms=2, parallel=False
  ),
}


@pytest.fixture(autouse=True)
def _strict() -> Iterator[None]:
  with jax.numpy_rank_promotion('raise'), jax.numpy_dtype_promotion('strict'):
    yield


def _tokens(length: int) -> np.ndarray:
  return np.random.default_rng(5).integers(0, 50, length, np.int32)


@functools.cache
def _init(
  config: config_lib.ModelConfig, dtype: str = 'float32', scale: float = 0.2
) -> Any:
  return models.init_params(config, jax.random.key(0), dtype, scale)


@functools.partial(jax.jit, static_argnums=0)
def _logits(
  config: config_lib.ModelConfig, params: Any, tokens: Any
) -> jax.Array:
  positions = jnp.arange(tokens.shape[0], dtype=jnp.int32)
  hidden, kv = models.forward(
    config,
    params,
    [None] * config.num_layers,
    tokens,
    positions,
    None,
    models.causal_attend,
  )
  assert kv == [None] * config.num_layers
  assert hidden.dtype == params['embed'].dtype
  return models.unembed(config, params, hidden)


@pytest.mark.parametrize(
  ('dtype', 'name'),
  [
    pytest.param(dtype, name, marks=marks)
    for dtype in ('bfloat16', 'float16')
    for name in CONFIGS
    # Where something is cast, it is to the dtype of what it meets.
    for marks in [
      ()
      if dtype == 'bfloat16' or name in ('llama_everything', 'gpt_oss')
      else pytest.mark.slow
    ]
  ],
)
def test_dtypes(name: str, dtype: str) -> None:
  """Every dtype works, and gives about what float32 does."""
  config = CONFIGS[name]
  params = _init(config, dtype, 0.1)
  specs = jax.tree.leaves(models.param_specs(config))
  for leaf, want in zip(jax.tree.leaves(params), specs, strict=True):
    assert leaf.dtype == (want.dtype or dtype)
  logits = _logits(config, params, _tokens(9))
  assert logits.dtype == jnp.float32 and logits.shape == (9, 50)
  exact = _logits(
    config,
    jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params),
    _tokens(9),
  )
  np.testing.assert_allclose(logits, exact, atol=0.05)


@pytest.mark.parametrize('name', CONFIGS)
def test_params_are_what_the_specs_say(name: str) -> None:
  config = CONFIGS[name]
  specs = models.param_specs(config)
  params = _init(config)
  checked = jax.tree.map(
    lambda want, leaf: (
      want.shape == leaf.shape and (len(want.axes) == leaf.ndim)
    ),
    specs,
    params,
  )
  assert all(jax.tree.leaves(checked))
  assert isinstance(specs['embed'], spec.ParamSpec)


def test_init_is_random_where_it_could_hide_a_mistake() -> None:
  config = CONFIGS['falcon_sequential']
  params = _init(config, scale=0.02)
  layer = params['layers'][0]
  scale, bias = layer['attn_norm']['scale'], layer['mlp']['up_bias']
  assert 0.9 < scale.min() < 1 < scale.max() < 1.1
  assert -0.1 < bias.min() < 0 < bias.max() < 0.1
  other = params['layers'][1]
  assert not jnp.array_equal(layer['attn']['q'], other['attn']['q'])


@pytest.mark.parametrize('name', CONFIGS)
def test_every_parameter_matters(name: str) -> None:
  """A leaf that the forward pass forgets has a gradient of zero."""
  config = CONFIGS[name]
  params = _init(config, scale=0.3)
  mixing = jax.random.normal(jax.random.key(1), (12, 50))
  grads = jax.jit(
    jax.grad(
      lambda params: jnp.sum(_logits(config, params, _tokens(12)) * mixing)
    )
  )(params)
  zero = [
    name
    for name, leaf in tree.named_leaves(grads).items()
    # What chooses, and weighs nothing, has none.
    if float(jnp.abs(leaf).max()) < 1e-6 and not name.endswith('choice_bias')
  ]
  assert not zero, zero


@pytest.mark.parametrize('name', CONFIGS)
def test_the_last_layer_computes_what_leaves_only(name: str) -> None:
  config = CONFIGS[name]
  params = _init(config)
  tokens = _tokens(12)
  rows = jnp.array([7, 2, 11], jnp.int32)

  @functools.partial(jax.jit, static_argnums=2)
  def run(params: Any, tokens: Any, leaving: bool) -> jax.Array:
    rotation = rope.tables(config.rope, config.head_dim, jnp.arange(12), None)
    x, _ = models.run_layers(
      config,
      params['layers'],
      [None] * config.num_layers,
      models.embed(config, params, tokens),
      [config.layer_kind(i) for i in range(config.num_layers)],
      lambda kind, rows: models.LayerContext(
        functools.partial(
          attention.turn_and_attend,
          models.causal_attend,
          rotation,
          options=kind.attention,
          rows=rows,
        ),
        rows=rows,
      ),
      leaving=rows if leaving else None,
    )
    return x

  few, whole = (
    run.lower(params, tokens, leaving).compile() for leaving in (True, False)
  )
  np.testing.assert_allclose(
    few(params, tokens), whole(params, tokens)[rows], atol=1e-5
  )
  some, everything = (
    compiled.cost_analysis()['flops'] for compiled in (few, whole)
  )
  assert some < 0.75 * everything, 'one of two layers has a quarter of the rows'


@pytest.mark.parametrize('name', CONFIGS)
def test_padding_after_the_end_changes_nothing(name: str) -> None:
  config = CONFIGS[name]
  params = _init(config)
  tokens = _tokens(12)
  np.testing.assert_allclose(
    _logits(config, params, tokens)[:9],
    _logits(config, params, tokens[:9]),
    atol=1e-5,
  )


def test_window_is_so_many_tokens_and_itself() -> None:
  """A token three back is out of a window of three."""
  q = jnp.zeros((5, 2, 4))
  k = jnp.zeros((5, 1, 4))
  v = jnp.eye(5)[:, None, :4] + jnp.zeros((5, 1, 4))
  out, _ = models.causal_attend(
    None, q, k, v, options=kinds.AttentionOptions(1.0, window=3)
  )
  third = 1 / 3
  np.testing.assert_allclose(out[3, 0], [0, third, third, third], atol=1e-6)
  np.testing.assert_allclose(out[4, 1], [0, 0, third, third], atol=1e-6)
  np.testing.assert_allclose(out[1, 1], [0.5, 0.5, 0, 0], atol=1e-6)


def test_a_soft_cap_bounds_scores_as_the_kernels_do() -> None:
  rng = np.random.default_rng(0)
  q, k, v = (
    jnp.asarray(rng.normal(0, 3, (6, heads, 8)), jnp.float32)
    for heads in (4, 2, 2)
  )
  out, _ = models.causal_attend(
    None, q, k, v, options=kinds.AttentionOptions(0.5, window=4, soft_cap=2.0)
  )
  pages = rpa.write_kv(
    *rpa.init_pages(1, 8, 2, 8, jnp.float32, 'reference'),
    k,
    v,
    jnp.arange(6, dtype=jnp.int32),
  )
  ints = functools.partial(jnp.array, dtype=jnp.int32)
  expected = rpa.ragged_paged_attention(
    q,
    *pages,
    ints([6]),
    ints([[0]]),
    ints([0, 6]),
    ints([0, 1]),
    scale=0.5,
    sliding_window=4,
    soft_cap=2.0,
    implementation='reference',
  )
  np.testing.assert_allclose(out, expected, atol=1e-5)


def test_the_factor_of_embeddings_is_rounded_first() -> None:
  """As in Gemma, which was trained so: sqrt(3072) is 55.5 in bfloat16."""
  config = config_lib.LlamaConfig(**_SIZES, embed_scale=3072**0.5)
  table = jnp.full((50, 32), 2.0)
  for dtype, factor in (('bfloat16', 55.5), ('float32', 3072**0.5)):
    x = models.embed(config, {'embed': table.astype(dtype)}, _tokens(3))
    np.testing.assert_allclose(x.astype(jnp.float32), 2 * factor, rtol=1e-6)


def test_query_heads_read_their_group() -> None:
  """Heads 0 and 1 read key and value head 0, heads 2 and 3 head 1."""
  v = jnp.stack([jnp.zeros((3, 2)), jnp.ones((3, 2))], axis=1)
  out, _ = models.causal_attend(
    None, jnp.ones((3, 4, 2)), v, v, options=kinds.AttentionOptions(1.0)
  )
  assert out[2, :, 0].tolist() == [0, 0, 1, 1]


def test_route_chooses_and_normalizes() -> None:
  config = CONFIGS['mixtral']
  assert isinstance(config, config_lib.MixtralConfig)
  x = jnp.asarray([[1.0, 0.0], [0.0, 1.0]])
  logits = jnp.log(jnp.asarray([[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1]]))
  experts, weights = router.route(config, {'router': logits}, x)
  assert experts.tolist() == [[3, 2], [0, 1]]
  expected = [[4 / 7, 3 / 7], [7 / 8, 1 / 8]]
  np.testing.assert_allclose(weights, expected, atol=1e-6)


def test_groups_and_biases_choose_and_do_not_weigh() -> None:
  """Of pairs of experts; sigmoids of 0, 1 and so on, by hand."""
  config = config_lib.MixtralConfig(
    **_SIZES,
    num_experts=6,
    experts_per_token=2,
    router=config_lib.RouterConfig(
      score='sigmoid', choice_bias=True, num_groups=3, top_groups=1, scale=2.0
    ),
  )
  params = {
    'router': jnp.asarray([[3.0, -9.0, 1.0, 1.0, 0.0, 0.0]]),
    'choice_bias': jnp.asarray([0.0, 0.0, 0.0, 0.0, 0.0, 0.5]),
  }
  scores = 1 / (1 + np.exp([-1.0, 0.0]))
  for bias, chosen, own in (
    (0.0, [2, 3], scores[[0, 0]]),  # The best one is in a weak pair.
    (0.5, [5, 4], scores[[1, 1]]),
  ):
    params['choice_bias'] = params['choice_bias'].at[5].set(bias)
    experts, weights = router.route(config, params, jnp.ones((1, 1)))
    assert experts.tolist() == [chosen]
    np.testing.assert_allclose(weights[0], 2 * own / own.sum(), rtol=1e-6)


def test_moe_is_the_sum_over_the_chosen_experts() -> None:
  config = CONFIGS['mixtral']
  assert isinstance(config, config_lib.MixtralConfig)
  params = _init(config, scale=0.3)
  layer = params['layers'][0]['moe']
  x = jax.random.normal(jax.random.key(2), (6, 32))
  experts, weights = router.route(config, layer, x)
  expected = np.zeros((6, 32), np.float32)
  for t in range(6):
    for e, weight in zip(experts[t], weights[t], strict=True):
      inner = jax.nn.silu(x[t] @ layer['gate'][e]) * (x[t] @ layer['up'][e])
      expected[t] += weight * (inner @ layer['down'][e])
  np.testing.assert_allclose(moe.moe(config, layer, x), expected, atol=1e-4)
  # Padding chooses nobody, and so takes nobody's place.
  is_token = jnp.arange(6) < 4
  x = x.at[4:].set(jnp.nan)
  got = moe.moe(config, layer, x, is_token)
  np.testing.assert_allclose(got[:4], expected[:4], atol=1e-4)
  assert not got[4:].any()


def test_lengths_of_heads_and_mlp_come_from_arrays() -> None:
  """Half of the heads and of the MLP, twice, sum to the whole: what a shard
  computes before the psum."""
  config = CONFIGS['llama']
  params = _init(config)
  specs = models.param_specs(config)
  split = {'heads', 'kv_heads', 'mlp'}

  def half(leaf: jax.Array, want: spec.ParamSpec, which: int) -> jax.Array:
    for axis, name in enumerate(want.axes):
      if name in split:
        return jnp.split(leaf, 2, axis)[which]
    return leaf

  x = jax.random.normal(jax.random.key(3), (5, 32))
  context = models.LayerContext(
    functools.partial(
      attention.turn_and_attend,
      models.causal_attend,
      rope.tables(config.rope, 8, jnp.arange(5), None),
      options=config.layer_kind(0).attention,
      rows=None,
    ),
  )

  def run(layer: Any) -> tuple[jax.Array, jax.Array]:
    out, _ = attention.attention(config, layer['attn'], None, x, context)
    return out, layers.gated_mlp(layer['mlp'], x, 'silu')

  layer, want = params['layers'][0], specs['layers'][0]
  shards = [
    run(
      jax.tree.map(
        lambda leaf, spec, which=which: half(leaf, spec, which), layer, want
      )
    )
    for which in range(2)
  ]
  for whole, first, second in zip(run(layer), *shards, strict=True):
    np.testing.assert_allclose(whole, first + second, atol=1e-5)
