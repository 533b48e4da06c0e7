# SPDX-License-Identifier: Apache-2.0
"""An LLM that is handed new weights, as in a training loop."""

from __future__ import annotations

from typing import Any

from flax import nnx
from flax.core import meta
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sarathi_jax import errors
from sarathi_jax import models
from sarathi_jax.models import config as config_lib
from sarathi_jax.runner import params as params_lib
from sarathi_jax.runner import weights
from tests import tiny
from tests.llm import common

GREEDY, PROMPTS = common.GREEDY, common.PROMPTS
tokens_of = common.tokens_of


def test_new_weights_are_those_of_a_fresh_llm(llm, new_params, greedy):
  assert greedy['old'] != greedy['new']
  with tiny.count_compiles() as compiled:
    assert tokens_of(llm.generate(PROMPTS, GREEDY)) == greedy['old']
    llm.update_params(new_params)
    assert tokens_of(llm.generate(PROMPTS, GREEDY)) == greedy['new']
  assert compiled == []


def test_new_weights_in_the_middle_of_a_stream(
  llm, params, new_params, make_llm
):
  """What was generated stays; what follows is of the new weights alone."""
  prompt = PROMPTS[2]
  tokens: list[int] = []
  stream = llm.stream(prompt, GREEDY)
  for _ in range(2):
    tokens += next(stream).token_ids
  llm.update_params(new_params)
  for delta in stream:
    tokens += delta.token_ids
  assert delta.metrics.num_preemptions == 1
  # What was in flight still came from the old weights.
  num_old = 2 + llm.engine._scheduler.config.max_in_flight - 1
  fresh = make_llm(new_params)
  (rest,) = fresh.generate([*prompt, *tokens[:num_old]], GREEDY)
  assert tuple(tokens[num_old:]) == rest.token_ids[: 6 - num_old]
  (old,) = make_llm(params).generate(prompt, GREEDY)
  assert tuple(tokens[:num_old]) == old.token_ids[:num_old]
  assert tuple(tokens) != old.token_ids


def test_only_the_names_of_new_weights_count(llm, new_params, greedy):
  """And one device's sharding is as good as another."""
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ('x',))
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  placed = jax.device_put(new_params, sharding)
  llm.update_params({**placed, 'layers': tuple(placed['layers'])})
  assert tokens_of(llm.generate(PROMPTS, GREEDY)) == greedy['new']


def without(tree: Any, name: str) -> Any:
  return {k: v for k, v in tree.items() if k != name}


@pytest.mark.parametrize(
  'change,words',
  [
    (lambda p: without(p, 'embed'), ['params.embed', 'missing in a llama']),
    (lambda p: {**p, 'extra': p['embed']}, ['params.extra', 'unknown']),
    (
      lambda p: {**p, 'layers': p['layers'] * 2},
      ['params.layers.1', 'unknown'],
    ),
    (
      lambda p: {**p, 'embed': p['embed'].T},
      ['params.embed', 'float32[16, 300]', 'float32[300, 16]'],
    ),
    (
      lambda p: {**p, 'embed': p['embed'].astype(jnp.bfloat16)},
      ['params.embed', 'bfloat16[300, 16]', 'must be float32'],
    ),
    (
      lambda p: jax.tree.map(lambda x: x.astype(jnp.bfloat16), p),
      ['bfloat16', 'must be float32'],
    ),
    (
      lambda p: {**p, 'embed': np.asarray(p['embed'])},
      ['params.embed', 'ndarray', 'jax.Array'],
    ),
    (lambda p: None, ['params: is a NoneType', 'a tree of arrays']),
    (lambda p: 'path', ['params: is a str', 'a tree of arrays']),
  ],
)
def test_wrong_weights_are_named_and_the_old_stay(
  llm, params, greedy, change, words
):
  with pytest.raises(errors.ConfigError) as caught:
    llm.update_params(change(params))
  for word in words:
    assert word in str(caught.value)
  assert tokens_of(llm.generate(PROMPTS[:1], GREEDY)) == greedy['old'][:1]


def boxed(tree: Any) -> Any:
  return jax.tree.map(nnx.Param, tree)


def stacked(tree: Any) -> Any:
  return {
    **tree,
    'layers': jax.tree.map(lambda *leaves: jnp.stack(leaves), *tree['layers']),
  }


@pytest.mark.parametrize(
  'change,found,wanted,remedies',
  [
    (
      lambda p: {'params': p},
      'params.layers.0.attn.k',
      'layers.0.attn.k',
      ["what is in its ['params']"],
    ),
    (boxed, 'layers.0.attn.k.value', 'layers.0.attn.k', ['nnx.to_pure_dict']),
    (
      lambda p: nnx.State(boxed({**p, 'layers': dict(enumerate(p['layers']))})),
      'layers.0.attn.k.value',
      'layers.0.attn.k',
      ['nnx.to_pure_dict'],
    ),
    (
      lambda p: jax.tree.map(
        lambda x: meta.Partitioned(x, (None,) * x.ndim), p
      ),
      'layers.0.attn.k.value',
      'layers.0.attn.k',
      ['core.meta.unbox'],
    ),
    (
      lambda p: (p, {}),
      '0.layers.0.attn.k',
      'layers.0.attn.k',
      ['what is in its [0]'],
    ),
    (stacked, 'layers.attn.k', 'layers.0.attn.k', ['make layers a list']),
    (
      lambda p: {'model': {'params': stacked(boxed(p))}},
      'model.params.layers.attn.k.value',
      'layers.0.attn.k',
      ["['model']['params']", 'boxes', 'a list'],
    ),
    (
      lambda p: without(p, 'layers') | {'layers_0': p['layers'][0]},
      'layers_0.attn.k',
      'layers.0.attn.k',
      [],
    ),
    (
      lambda p: without(p, 'embed') | {'embedding': p['embed']},
      'embedding',
      'embed',
      [],
    ),
  ],
)
def test_trees_that_are_nearly_right_are_told_what_is_wanted(
  llm, params, change, found, wanted, remedies
):
  with pytest.raises(errors.ConfigError) as caught:
    llm.update_params(change(params))
  for words in (f'params.{found}', f'params.{wanted}', *remedies):
    assert words in str(caught.value)


def test_what_is_told_to_be_handed_over_is_taken(llm, new_params, greedy):
  state = nnx.State(
    boxed({**new_params, 'layers': dict(enumerate(new_params['layers']))})
  )
  layers = stacked(new_params)['layers']
  for params in (
    nnx.to_pure_dict(state),
    meta.unbox(
      jax.tree.map(lambda x: meta.Partitioned(x, (None,) * x.ndim), new_params)
    ),
    {
      **new_params,
      'layers': [jax.tree.map(lambda x, i=i: x[i], layers) for i in range(1)],
    },
  ):
    llm.update_params(params)
    assert tokens_of(llm.generate(PROMPTS, GREEDY)) == greedy['new']


@pytest.mark.parametrize('is_full', [False, True])
def test_an_update_that_fails_leaves_the_old_weights(
  llm, new_params, greedy, monkeypatch, is_full
):
  """In the middle of moving them; and of a stream, which goes on."""
  stream = llm.stream(PROMPTS[0], GREEDY)
  tokens = list(next(stream).token_ids)
  place, num_placed = weights._place_one, 0

  def fail(*args: Any) -> Any:
    nonlocal num_placed
    num_placed += 1
    if num_placed == 5:
      if is_full:  # There is memory for one at a time.
        raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: memory')
      raise ValueError
    return place(*args)

  monkeypatch.setattr(weights, '_place_one', fail)
  if is_full:
    llm.update_params(new_params)
    stream.close()
  else:
    with pytest.raises(errors.ConfigError, match=r'ValueError.*old weights st'):
      llm.update_params(new_params)
    assert (*tokens, *(t for d in stream for t in d.token_ids)) == (
      greedy['old'][0]
    )
  assert (
    tokens_of(llm.generate(PROMPTS, GREEDY))
    == (greedy['new' if is_full else 'old'])
  )


def test_weights_of_a_dtype_that_attention_lacks(params, make_llm):
  whole = jax.tree.map(lambda x: x.astype(jnp.int32), params)
  with pytest.raises(
    errors.ConfigError, match=(r'int32.*must be float32 or bfloat16 or float16')
  ):
    make_llm(whole)


def test_weights_that_have_a_dtype_of_their_own():
  """What chooses experts is float32 in any model."""
  model = config_lib.MixtralConfig(
    vocab_size=16,
    hidden_size=8,
    intermediate_size=4,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
    max_position_embeddings=8,
    num_experts=4,
    experts_per_token=2,
    router=config_lib.RouterConfig(score='sigmoid', choice_bias=True),
  )
  params = models.init_params(model, jax.random.key(0), jnp.bfloat16)
  params_lib.check_params(model, params)
  params_lib.check_params(model, params, jnp.dtype(jnp.bfloat16))
  assert params_lib.dtype_of(model, params) == jnp.bfloat16
  narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  with pytest.raises(
    errors.ConfigError, match=r'choice_bias: is bfloat16.*be float32\[4\]'
  ):
    params_lib.check_params(model, narrow)


def test_weights_of_several_dtypes(params, make_llm):
  """Which of them is to be computed in is not guessed."""
  mixed = {**params, 'embed': params['embed'].astype(jnp.bfloat16)}
  with pytest.raises(errors.ConfigError) as caught:
    make_llm(mixed)
  for words in ('one dtype', 'embed is bfloat16', 'is float32'):
    assert words in str(caught.value)


def test_weights_that_a_trainer_donated(llm, new_params, greedy):
  """Named, and no harm done: the new ones are served next."""
  donated = jax.tree.map(jnp.copy, new_params)
  llm.update_params(donated)
  stream = llm.stream(PROMPTS[0], GREEDY)
  next(stream)
  train_step = jax.jit(
    lambda p: jax.tree.map(lambda x: x + 0, p), donate_argnums=0
  )
  trained = train_step(donated)
  with pytest.raises(errors.ConfigError, match=r'donated.*update_params'):
    list(stream)
  with pytest.raises(errors.ConfigError, match=r'donated.*update_params'):
    llm.generate(PROMPTS, GREEDY)
  with pytest.raises(errors.ConfigError, match='donated'):
    llm.update_params(donated)
  llm.update_params(trained)
  assert tokens_of(llm.generate(PROMPTS, GREEDY)) == greedy['new']


def test_a_training_loop(llm):
  """The example of LLM's docstring: it gets likelier what is trained for."""
  prompt, target = [5, 6, 7], 9
  tokens = jnp.array([*prompt, *[target] * 3], jnp.int32)

  def loss(params: Any) -> jax.Array:
    return -common.all_logprobs(params, tokens)[2:5, target].sum()

  def update(params: Any) -> Any:
    return jax.tree.map(
      lambda p, g: p - 0.05 * g, params, jax.grad(loss)(params)
    )

  train_step = jax.jit(update, donate_argnums=0)
  params = tiny.make_params()
  rewards = []
  for _ in range(10):
    (done,) = llm.generate(prompt, GREEDY)
    rewards.append(done.token_ids[:3].count(target))
    params = train_step(params)
    llm.update_params(params)
  assert rewards[0] == 0 and rewards[-1] == 3


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_weights_in_half_precision(dtype, make_llm):
  llm = make_llm(
    tiny.make_params(dtype=dtype), token_budget=4, **tiny.STEPS_ALONE
  )
  done = llm.generate(PROMPTS, GREEDY)
  assert all(len(c.token_ids) == 6 for c in done)
  assert all(np.isfinite(c.logprobs).all() for c in done)
  assert tokens_of(llm.generate(PROMPTS, GREEDY)) == tokens_of(done)


def test_what_the_cache_has_can_be_forgotten(llm):
  prompt = list(range(1, 40))

  def num_found() -> int:
    (done,) = llm.generate([prompt], GREEDY)
    return done.metrics.num_cached_tokens

  num_found()
  assert num_found() > 0
  stream = llm.stream(prompt, GREEDY)
  next(stream)
  assert not llm.reset_prefix_cache()  # It is in use.
  stream.close()
  assert llm.reset_prefix_cache()
  assert num_found() == 0 < num_found()
