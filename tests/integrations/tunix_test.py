# SPDX-License-Identifier: Apache-2.0
"""Rollouts by the engine beside tunix's own code, where that is installed."""

from __future__ import annotations

from collections.abc import Iterator
import importlib
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sarathi_jax
from sarathi_jax import errors
from tests import tiny

pytest.importorskip('tunix', reason='needs google-tunix: scripts/test --slow')
pytestmark = [
  pytest.mark.tunix,
  pytest.mark.slow,
  pytest.mark.filterwarnings('ignore'),
]

_SIZES = dict(
  num_layers=2,
  embed_dim=32,
  hidden_dim=48,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
)
_USUAL = _SIZES | dict(vocab_size=30, rope_theta=5e5, norm_eps=1e-5)
_GEMMA3 = _SIZES | dict(
  num_layers=7,
  num_embed=30,
  sliding_window_size=4,
  global_base_frequency=1_000_000,
  global_scale_factor=8.0,
  param_dtype=jnp.float32,
)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
  'llama3': ('llama3.Llama3', _USUAL),
  'llama3, tied': ('llama3.Llama3', _USUAL | dict(weight_tying=True)),
  'qwen2': ('qwen2.Qwen2', _USUAL | dict(use_tied_embedding=True)),
  'qwen3': ('qwen3.Qwen3', _USUAL),
  'qwen3, experts': (
    'qwen3.Qwen3',
    _USUAL | dict(num_experts=4, num_experts_per_tok=2),
  ),
  'gemma3': ('gemma3.Gemma3', _GEMMA3),
  'gemma3, all heads': ('gemma3.Gemma3', _GEMMA3 | dict(num_kv_heads=4)),
}
PROMPTS = ['hello'] * 3 + ['a'] + ['sevenlets'] * 2 + ['hello']
TEMPERATURE = 0.9


@pytest.fixture(scope='module', autouse=True)
def _jax_is_lenient() -> Iterator[None]:
  """Of all threads: tunix samples in another."""
  names = 'jax_numpy_dtype_promotion', 'jax_numpy_rank_promotion'
  was = [getattr(jax.config, name) for name in names]
  for name, value in zip(names, ('standard', 'allow'), strict=True):
    jax.config.update(name, value)
  yield
  for name, value in zip(names, was, strict=True):
    jax.config.update(name, value)


def make_mesh(fsdp: int, tp: int) -> jax.sharding.Mesh:
  devices = np.array(jax.devices()[: fsdp * tp]).reshape(fsdp, tp)
  return jax.sharding.Mesh(devices, ('fsdp', 'tp'))


def lively(state: Any, seed: int) -> Any:
  """Returns other weights, where and as those are."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: jax.device_put(
      x + rng.normal(0, 0.2, x.shape).astype(x.dtype), x.sharding
    ),
    state,
  )


def make_model(name: str, mesh: jax.sharding.Mesh) -> nnx.Module:
  path, fields = MODELS[name]
  module, cls = path.split('.')
  found = importlib.import_module(f'tunix.models.{module}.model')
  model = getattr(found, cls)(found.ModelConfig(**fields), rngs=nnx.Rngs(0))
  state = nnx.state(model)
  specs = nnx.get_partition_spec(state)
  nnx.update(
    model,
    lively(
      jax.tree.map(
        lambda x, spec: jax.device_put(
          x, jax.sharding.NamedSharding(mesh, spec)
        ),
        state,
        specs,
      ),
      0,
    ),
  )
  return model


def rollout_config(**fields: Any) -> Any:
  from tunix.rl.rollout import base_rollout

  return base_rollout.RolloutConfig(
    **dict(
      max_prompt_length=12,
      max_tokens_to_generate=8,
      kv_cache_size=32,
      temperature=TEMPERATURE,
      return_logprobs=True,
    )
    | fields
  )


def make_rollout(
  model: nnx.Module, mesh: jax.sharding.Mesh, **fields: Any
) -> Any:
  from tunix.generate import tokenizer_adapter

  from examples import grpo_tunix
  from sarathi_jax.integrations import tunix

  return tunix.SarathiRollout(
    rollout_actor=model,
    tokenizer=tokenizer_adapter.TokenizerAdapter(grpo_tunix.Letters()),
    mesh=mesh,
    rollout_config=rollout_config(**fields),
    config=tiny.engine_config(
      token_budget=16,
      num_pages=80,
      grammars=False,
      compilation_cache_dir=None,
    ),
  )


def padded(rollout: Any, output: Any) -> jax.Array:
  rows = np.full((len(output.tokens), 8), rollout.pad_id(), np.int32)
  for row, tokens in zip(rows, output.tokens, strict=True):
    row[: len(tokens)] = tokens
  return jnp.asarray(rows)


def trainers(model: nnx.Module, rollout: Any, output: Any) -> np.ndarray:
  from tunix.rl import common

  return np.asarray(
    common.compute_per_token_logps(
      *nnx.split(model),
      prompt_tokens=jnp.asarray(output.left_padded_prompt_tokens),
      completion_tokens=padded(rollout, output),
      pad_id=rollout.pad_id(),
      eos_id=rollout.eos_id(),
      temperature=TEMPERATURE,
    )
  )


def check(model: nnx.Module, rollout: Any, output: Any) -> None:
  """Compares all log-probabilities with the trainer's."""
  theirs = trainers(model, rollout, output)
  for ours, row in zip(output.logprobs, theirs, strict=True):
    np.testing.assert_allclose(ours, row[: len(ours)], atol=1e-4)
  completions = padded(rollout, output)
  scores = rollout.get_per_token_logps(
    jnp.asarray(output.left_padded_prompt_tokens), completions
  )
  is_token = np.asarray(completions) != rollout.pad_id()
  assert is_token.sum() > 5
  np.testing.assert_allclose(
    np.asarray(scores), np.where(is_token, theirs, 0), atol=1e-4
  )


@pytest.mark.parametrize('name', MODELS)
def test_log_probabilities_are_the_trainers(name):
  """Before and after new weights, for which nothing is compiled."""
  mesh = make_mesh(2, 1)
  model = make_model(name, mesh)
  rollout = make_rollout(model, mesh)
  output = rollout.generate(PROMPTS, rollout_config())
  check(model, rollout, output)
  for seed in (1, 2, 3):
    nnx.update(model, lively(nnx.state(model), seed))
    with tiny.count_compiles() as compiled:
      with (  # as tunix
        jax.transfer_guard_device_to_host('disallow_explicit'),
        jax.transfer_guard_host_to_device('disallow_explicit'),
      ):
        rollout.update_params(nnx.state(model, (nnx.Param,)), (nnx.Param,))
      other = rollout.generate(PROMPTS, rollout_config())
    if seed > 1:
      assert compiled == []
    check(model, rollout, other)
  assert [t.tolist() for t in other.tokens] != [
    t.tolist() for t in output.tokens
  ]


@pytest.mark.parametrize(
  ('theirs', 'ours'), [((1, 2), (1, 2)), ((2, 1), (1, 1)), ((1, 1), (2, 2))]
)
def test_other_meshes(theirs, ours):
  """The rollouts' own devices, as many as the trainer's, fewer, or more."""
  model = make_model('qwen3', make_mesh(*theirs))
  rollout = make_rollout(model, make_mesh(*ours))
  for seed in (1, 2):
    nnx.update(model, lively(nnx.state(model), seed))
    rollout.update_params(nnx.state(model, (nnx.Param,)), (nnx.Param,))
    check(model, rollout, rollout.generate(PROMPTS, rollout_config()))
  assert not any(
    leaf.is_deleted() for leaf in jax.tree.leaves(nnx.state(model))
  )


@pytest.fixture(scope='module')
def made() -> Any:
  mesh = make_mesh(1, 1)
  model = make_model('qwen3', mesh)
  return model, make_rollout(model, mesh)


def test_outputs_are_as_a_learner_takes_them(made):
  """As its own sampler gives them, but with the token that ended them."""
  from tunix.rl.rollout import base_rollout
  from tunix.rl.rollout import vanilla_rollout

  model, rollout = made
  sampler = vanilla_rollout.VanillaRollout(
    model, rollout._tokenizer, base_rollout.CacheConfig(32, 2, 2, 8)
  )
  for fields in ({}, dict(max_prompt_length=4), dict(return_logprobs=False)):
    # The likeliest of all, but for its own sampler's division by 0.
    config = rollout_config(top_k=1, **fields)
    theirs, ours = (one.generate(PROMPTS, config) for one in (sampler, rollout))
    assert theirs.text == ours.text
    np.testing.assert_array_equal(
      theirs.left_padded_prompt_tokens, ours.left_padded_prompt_tokens
    )
    for a, b in zip(theirs.tokens, ours.tokens, strict=True):
      ended = len(b) > len(a)
      np.testing.assert_array_equal(a, b[: len(b) - ended])
      assert not ended or b[-1] == rollout.eos_id()
      assert ended or len(b) == 8
    if theirs.logprobs is None:
      assert ours.logprobs is None
      continue
    for a, b in zip(theirs.logprobs, ours.logprobs, strict=True):
      np.testing.assert_allclose(a, b[: len(a)], atol=1e-4)


def tokens_of(output: Any) -> list[list[int]]:
  return [tokens.tolist() for tokens in output.tokens]


def test_seeds(made):
  _, rollout = made
  prompts = ['hello'] * 6

  def draw(seed: Any) -> list[list[int]]:
    return tokens_of(rollout.generate(prompts, rollout_config(seed=seed)))

  one = draw(jax.random.PRNGKey(1))
  assert one == draw(jax.random.key(1)) == draw(jax.random.PRNGKey(1))
  assert len({tuple(tokens) for tokens in one}) > 1
  two = draw(jax.random.PRNGKey(2))
  assert one[1:] != two[:-1] and one != two
  assert draw(None) != draw(None)


def test_what_ends_an_output(made):
  _, rollout = made
  every = list(range(3, 30))
  config = rollout_config(eos_tokens=every, max_tokens_to_generate=3)
  output = rollout.generate(PROMPTS, config)
  assert all(
    len(t) <= 3 and t[-1] in every for t in output.tokens if len(t) < 3
  )
  assert set(output.text) == {''}


def test_memory_of_the_cache_is_the_trainers_meanwhile(made):
  _, rollout = made
  before = tokens_of(rollout.generate(PROMPTS, rollout_config(temperature=0)))
  rollout.llm.sleep()
  after = tokens_of(rollout.generate(PROMPTS, rollout_config(temperature=0)))
  assert before == after


def test_what_is_not_supported_is_refused(made):
  model, rollout = made
  with pytest.raises(errors.UnsupportedError, match='images: is not supp'):
    rollout.generate(['a'], rollout_config(), images=[1])
  with pytest.raises(errors.InvalidRequestError, match='no room'):
    rollout.generate(['a' * 40], rollout_config())
  state = nnx.state(model)
  state['lm_head']['w_lora_a'] = nnx.LoRAParam(jnp.zeros((2, 2)))
  with pytest.raises(errors.ConfigError, match=r'lm_head\.w_lora_a: .*LoRA'):
    rollout.update_params(state, (nnx.LoRAParam,))
  state = jax.tree.map(
    lambda x: jax.device_put(x, x.sharding.with_memory_kind('pinned_host')),
    nnx.state(model),
  )
  with pytest.raises(errors.ConfigError, match=r'pinned_host.*offload_to_cpu'):
    rollout.update_params(state)
  with pytest.raises(errors.ConfigError, match='offload_to_cpu'):
    jax.tree.map(lambda x: x.sharding, nnx.state(rollout.model()))


def test_bfloat16_is_served_where_it_is_asked_for(made):
  model, _ = made
  rollout = make_rollout(model, make_mesh(1, 1), data_type=jnp.bfloat16)
  output = rollout.generate(PROMPTS, rollout_config())
  theirs = trainers(model, rollout, output)
  difference = sarathi_jax.compare_logprobs(
    output.logprobs,
    [row[: len(t)] for row, t in zip(theirs, output.tokens, strict=True)],
  )
  assert 1e-4 < difference.mean < 0.1
