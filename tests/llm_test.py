# SPDX-License-Identifier: Apache-2.0
"""The engine inside a JAX program."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
import os
import signal
import subprocess
import sys
import threading
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache
import jax.numpy as jnp
import numpy as np
import pytest

import sarathi_jax
from sarathi_jax import errors
from sarathi_jax import llm as llm_lib
from sarathi_jax import models
from sarathi_jax import types
from sarathi_jax.engine import tokenizer as tokenizer_lib
from tests import tiny
from tests import tokenizer_fixture

MODEL = tiny.MODEL
GREEDY = types.SamplingParams(temperature=0, max_tokens=6)
PROMPTS = [[5, 6, 7], [8], list(range(20, 50))]


@pytest.fixture(scope='module')
def cache_dir(tmp_path_factory) -> Iterator[str]:
  """Equal steps are compiled once for all the LLMs here."""
  yield str(tmp_path_factory.mktemp('compiled'))
  jax.config.update('jax_compilation_cache_dir', None)
  compilation_cache.reset_cache()


@pytest.fixture(scope='module')
def make_llm(cache_dir, tmp_path_factory):
  folder = tokenizer_fixture.write(tmp_path_factory.mktemp('tokenizer'))
  words = tokenizer_lib.Tokenizer(folder)

  def make(params: Any, *, tokenizer: Any = words,
           default_sampling: Any = None, **fields: Any) -> llm_lib.LLM:
    return llm_lib.LLM(
      MODEL, params, tokenizer=tokenizer, default_sampling=default_sampling,
      config=tiny.engine_config(compilation_cache_dir=cache_dir, **fields))

  return make


@pytest.fixture(scope='module')
def params() -> Any:
  return tiny.make_params()


@pytest.fixture(scope='module')
def new_params() -> Any:
  return tiny.make_params(seed=1)


@pytest.fixture(scope='module')
def shared_llm(make_llm, params) -> llm_lib.LLM:
  return make_llm(params)


@pytest.fixture
def llm(shared_llm, params) -> Iterator[llm_lib.LLM]:
  """One for all tests, which leave it with its weights and pages."""
  yield shared_llm
  shared_llm.update_params(params)
  stats = shared_llm.engine.stats()
  assert stats.num_free_pages == stats.num_pages
  assert stats.num_running == stats.num_waiting == 0
  assert not shared_llm.engine.has_work


@pytest.fixture(scope='module')
def greedy(make_llm, params, new_params) -> dict[str, list[tuple[int, ...]]]:
  """PROMPTS' tokens with either weights, of LLMs that serve nothing else."""
  return {name: [c.token_ids for c in make_llm(p).generate(PROMPTS, GREEDY)]
          for name, p in (('old', params), ('new', new_params))}


def all_logprobs(params: Any, tokens: jax.Array) -> jax.Array:
  """[T, V], by a model without a cache."""
  hidden, _ = models.forward(
    MODEL, params, [None] * MODEL.num_layers, tokens,
    jnp.arange(len(tokens), dtype=jnp.int32), None, models.causal_attend)
  return jax.nn.log_softmax(models.unembed(MODEL, params, hidden))


def tokens_of(done: list[types.Completion]) -> list[tuple[int, ...]]:
  return [c.token_ids for c in done]


def test_text_token_ids_lists_and_chats_are_prompts(llm):
  text, chat = 'The quick', [{'role': 'user', 'content': 'a fox'}]
  ids = llm.engine.tokenizer.encode(text)
  one, = llm.generate(text, GREEDY)
  assert one.prompt_token_ids == ids
  assert len(one.token_ids) == len(one.logprobs) == 6
  assert one.finish_reason is types.FinishReason.LENGTH
  assert one.text
  same = [ids, list(ids), np.array(ids), jnp.array(ids)]
  for prompt in same:
    assert llm.generate(prompt, GREEDY)[0].token_ids == one.token_ids
  assert tokens_of(llm.generate(same, GREEDY)) == [one.token_ids] * 4
  assert tokens_of(llm.generate(np.stack([ids, ids]), GREEDY)) == (
    [one.token_ids] * 2)
  of_chat, = llm.generate(chat, GREEDY)
  assert of_chat.prompt_token_ids == (
    llm.engine.tokenizer.apply_chat_template(chat))
  mixed = llm.generate([text, list(ids), chat], GREEDY)
  assert tokens_of(mixed) == [one.token_ids, one.token_ids, of_chat.token_ids]
  assert llm.generate([]) == []


def test_logprobs_are_those_of_the_model(llm, params):
  sampling = types.SamplingParams(temperature=1.5, top_k=9, seed=1)
  model = jax.jit(all_logprobs)
  for prompt, done in zip(PROMPTS, llm.generate(PROMPTS, sampling),
                          strict=True):
    tokens = np.zeros(MODEL.context_len, np.int32)
    stop = len(prompt) + len(done.token_ids)
    tokens[:stop] = [*prompt, *done.token_ids]
    logprobs = np.asarray(model(params, tokens))
    at = np.arange(len(prompt), stop)
    np.testing.assert_allclose(
      done.logprobs, logprobs[at - 1, tokens[at]], atol=1e-4)


def test_each_prompt_may_have_its_own_sampling(llm, greedy):
  seeded = types.SamplingParams(temperature=2, seed=7, max_tokens=3)
  done = llm.generate(PROMPTS, [GREEDY, seeded, GREEDY])
  assert done[0].token_ids == greedy['old'][0]
  assert done[2].token_ids == greedy['old'][2]
  assert done[1].token_ids == llm.generate(PROMPTS[1], seeded)[0].token_ids
  assert len(done[1].token_ids) == 3
  with pytest.raises(errors.InvalidRequestError,
                     match=r'sampling: 2 for 3 prompts'):
    llm.generate(PROMPTS, [GREEDY, GREEDY])


def test_it_can_be_used_again_and_again(llm, greedy):
  for _ in range(3):
    assert tokens_of(llm.generate(PROMPTS, GREEDY)) == greedy['old']


def test_a_bad_prompt_among_good_ones_starts_none(llm):
  before = llm.engine.metrics.num_steps
  for bad in ([], [10**6], [-1], list(range(64)), [1.5], np.array([1.5])):
    with pytest.raises(errors.InvalidRequestError):
      llm.generate([[1, 2], bad, [3]], GREEDY)
    assert not llm.engine.has_work
  assert llm.engine.metrics.num_steps == before


def test_a_stream_is_the_same_token_by_token(llm, greedy):
  deltas = list(llm.stream(PROMPTS[0], GREEDY))
  assert tuple(t for d in deltas for t in d.token_ids) == greedy['old'][0]
  assert [d.finish_reason for d in deltas[:-1]] == [None] * 5
  assert deltas[-1].finish_reason is types.FinishReason.LENGTH
  assert deltas[-1].metrics.num_output_tokens == 6


def test_a_bad_prompt_of_a_stream_is_told_at_once(llm):
  with pytest.raises(errors.InvalidRequestError):
    llm.stream([])


def test_leaving_a_stream_early_frees_its_pages(llm):
  stream = llm.stream(PROMPTS[2], GREEDY)
  next(stream)
  assert llm.engine.stats().num_free_pages < llm.engine.stats().num_pages
  stream.close()
  assert llm.engine.stats().num_free_pages == llm.engine.stats().num_pages
  assert llm.engine.metrics.num_aborted >= 1


def test_streams_take_turns(llm, greedy):
  """None loses what the steps of another brought."""
  sampling = types.SamplingParams(temperature=0, max_tokens=6)
  got: list[list[int]] = [[], [], []]
  streams = {i: llm.stream(p, sampling) for i, p in enumerate(PROMPTS)}
  done_between = None
  while streams:
    for i, stream in list(streams.items()):
      delta = next(stream, None)
      if delta is None:
        del streams[i]
      else:
        got[i].extend(delta.token_ids)
    if done_between is None:
      done_between = llm.generate(PROMPTS, GREEDY)
  assert [tuple(g) for g in got] == greedy['old']
  assert tokens_of(done_between) == greedy['old']


def test_leaving_one_stream_leaves_the_other(llm, greedy):
  left = llm.stream(PROMPTS[1], GREEDY)
  kept = llm.stream(PROMPTS[0], GREEDY)
  next(left)
  tokens = list(next(kept).token_ids)
  left.close()
  tokens += [t for d in kept for t in d.token_ids]
  assert tuple(tokens) == greedy['old'][0]


def test_new_weights_are_those_of_a_fresh_llm(llm, new_params, greedy):
  assert greedy['old'] != greedy['new']
  with tiny.count_compiles() as compiled:
    assert tokens_of(llm.generate(PROMPTS, GREEDY)) == greedy['old']
    llm.update_params(new_params)
    assert tokens_of(llm.generate(PROMPTS, GREEDY)) == greedy['new']
  assert compiled == []


def test_new_weights_in_the_middle_of_a_stream(llm, params, new_params,
                                               make_llm):
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
  rest, = fresh.generate([*prompt, *tokens[:num_old]], GREEDY)
  assert tuple(tokens[num_old:]) == rest.token_ids[:6 - num_old]
  old, = make_llm(params).generate(prompt, GREEDY)
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


@pytest.mark.parametrize('change,words', [
  (lambda p: without(p, 'embed'), ['params.embed', 'missing in a llama']),
  (lambda p: {**p, 'extra': p['embed']}, ['params.extra', 'unknown']),
  (lambda p: {**p, 'layers': p['layers'] * 2}, ['params.layers.1', 'unknown']),
  (lambda p: {**p, 'embed': p['embed'].T},
   ['params.embed', 'float32[16, 300]', 'float32[300, 16]']),
  (lambda p: {**p, 'embed': p['embed'].astype(jnp.bfloat16)},
   ['params.embed', 'bfloat16[300, 16]', 'must be float32']),
  (lambda p: jax.tree.map(lambda x: x.astype(jnp.bfloat16), p),
   ['bfloat16', 'must be float32']),
  (lambda p: {**p, 'embed': np.asarray(p['embed'])},
   ['params.embed', 'ndarray', 'jax.Array']),
])
def test_wrong_weights_are_named_and_the_old_stay(llm, params, greedy, change,
                                                  words):
  with pytest.raises(errors.ConfigError) as caught:
    llm.update_params(change(params))
  for word in words:
    assert word in str(caught.value)
  assert tokens_of(llm.generate(PROMPTS[:1], GREEDY)) == greedy['old'][:1]


def test_weights_of_a_dtype_that_attention_lacks(params, make_llm):
  whole = jax.tree.map(lambda x: x.astype(jnp.int32), params)
  with pytest.raises(errors.ConfigError, match=(
      r'int32.*must be float32 or bfloat16 or float16')):
    make_llm(whole)


def test_weights_that_a_trainer_donated(llm, new_params, greedy):
  """Named, and no harm done: the new ones are served next."""
  donated = jax.tree.map(jnp.copy, new_params)
  llm.update_params(donated)
  stream = llm.stream(PROMPTS[0], GREEDY)
  next(stream)
  train_step = jax.jit(
    lambda p: jax.tree.map(lambda x: x + 0, p), donate_argnums=0)
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
    return -all_logprobs(params, tokens)[2:5, target].sum()

  def update(params: Any) -> Any:
    return jax.tree.map(lambda p, g: p - 0.05 * g, params,
                        jax.grad(loss)(params))

  train_step = jax.jit(update, donate_argnums=0)
  params = tiny.make_params()
  rewards = []
  for _ in range(10):
    done, = llm.generate(prompt, GREEDY)
    rewards.append(done.token_ids[:3].count(target))
    params = train_step(params)
    llm.update_params(params)
  assert rewards[0] == 0 and rewards[-1] == 3


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_weights_in_half_precision(dtype, make_llm):
  llm = make_llm(tiny.make_params(dtype=dtype), token_budget=4)
  done = llm.generate(PROMPTS, GREEDY)
  assert all(len(c.token_ids) == 6 for c in done)
  assert all(np.isfinite(c.logprobs).all() for c in done)
  assert tokens_of(llm.generate(PROMPTS, GREEDY)) == tokens_of(done)


def test_inside_a_running_event_loop(llm, greedy):
  """As a notebook has it."""
  async def cell() -> list[types.Completion]:
    return llm.generate(PROMPTS, GREEDY)

  assert tokens_of(asyncio.run(cell())) == greedy['old']


def test_outside_of_the_main_thread(llm, greedy):
  got: list[types.Completion] = []
  thread = threading.Thread(
    target=lambda: got.extend(llm.generate(PROMPTS, GREEDY)))
  thread.start()
  thread.join()
  assert tokens_of(got) == greedy['old']


def test_a_notebooks_stop_button_leaves_it_in_order(llm, greedy, monkeypatch):
  """Pressed in the worst moment: a step is planned, but not launched."""
  launch = llm._runner.launch
  presses = iter([False, True])

  def press_and_launch(batch: types.ScheduledBatch) -> Any:
    if next(presses, False):
      os.kill(os.getpid(), signal.SIGINT)
    return launch(batch)

  monkeypatch.setattr(llm._runner, 'launch', press_and_launch)
  with pytest.raises(KeyboardInterrupt):
    llm.generate(PROMPTS, GREEDY)
  assert llm.engine.stats().num_free_pages == llm.engine.stats().num_pages
  assert tokens_of(llm.generate(PROMPTS, GREEDY)) == greedy['old']


def test_after_a_fault_it_says_so(make_llm, params, monkeypatch):
  llm = make_llm(params)

  def fail(pending: Any) -> Any:
    raise RuntimeError('RESOURCE_EXHAUSTED: out of memory')

  monkeypatch.setattr(llm._runner, 'fetch', fail)
  for _ in range(2):
    with pytest.raises(errors.EngineDeadError, match='out of memory') as caught:
      llm.generate(PROMPTS, GREEDY)
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize('fields,words', [
  (dict(max_model_len=65), ['max_model_len=65', 'at most 64']),
  (dict(policy='fifo'), ["policy='fifo'", 'sarathi, vllm, orca']),
  (dict(token_budget=3), ['token_budget=3', 'max_num_seqs=4']),
  (dict(num_pages=2, max_model_len=32), ['max_model_len=32', '4 pages']),
])
def test_a_configuration_that_cant_work_is_refused(make_llm, params, fields,
                                                   words):
  with pytest.raises(errors.ConfigError) as caught:
    make_llm(params, **fields)
  for word in words:
    assert word in str(caught.value)


def test_a_model_without_a_tokenizer_takes_token_ids(make_llm, params, greedy):
  llm = make_llm(params, tokenizer=None)
  done = llm.generate(PROMPTS, GREEDY)
  assert tokens_of(done) == greedy['old']
  assert done[0].text == ''
  with pytest.raises(errors.UnsupportedError, match='no tokenizer'):
    llm.generate('text')


def test_a_compilation_cache_that_cant_be_made(params, tmp_path):
  (tmp_path / 'file').touch()
  with pytest.raises(errors.ConfigError,
                     match=r'compilation_cache_dir=.*Not a directory'):
    llm_lib.LLM(MODEL, params, config=tiny.engine_config(
      compilation_cache_dir=str(tmp_path / 'file' / 'compiled')))


def test_steps_compiled_before_are_found_again(cache_dir, shared_llm):
  """Though this process had compiled other things before there was a cache."""
  assert any(name.startswith('jit_run-') for name in os.listdir(cache_dir))


_EIGHT_DEVICES = '''
import jax
import numpy as np
from sarathi_jax import errors, llm
from tests import tiny
assert len(jax.devices()) == 8
mesh = jax.sharding.Mesh(np.array(jax.devices()), ('tp',))
spec = jax.sharding.PartitionSpec
whole = tiny.make_params()
split = {**whole, 'final_norm': jax.device_put(
  whole['final_norm'], jax.sharding.NamedSharding(mesh, spec('tp')))}
apart = {**whole, 'final_norm': jax.device_put(
  whole['final_norm'], jax.devices()[3])}
there = jax.device_put(whole, jax.devices()[5])
def refuse(params, **fields):
  try:
    llm.LLM(tiny.MODEL, params, config=tiny.engine_config(), **fields)
  except errors.ConfigError as error:
    print(error)
refuse(split)
refuse(apart)
refuse(whole, mesh=mesh)
one = llm.LLM(tiny.MODEL, there, config=tiny.engine_config(token_budget=4))
print('runs on', one._runner._kv[0][0].devices())
print(len(one.generate([1, 2, 3])[0].token_ids))
try:
  one.update_params(whole)
except errors.ConfigError as error:
  print(error)
'''


def test_several_devices_are_refused_by_name():
  env = dict(os.environ, JAX_PLATFORMS='cpu',
             XLA_FLAGS='--xla_force_host_platform_device_count=8')
  done = subprocess.run(
    [sys.executable, '-c', _EIGHT_DEVICES], env=env, capture_output=True,
    text=True, check=False, cwd=os.path.dirname(os.path.dirname(__file__)))
  assert done.returncode == 0, done.stderr
  lines = done.stdout.splitlines()
  assert 'params.final_norm.scale: is on 8 devices; must be on one' in lines[0]
  assert 'params.final_norm.scale: is on cpu:3; must be on cpu:0' in lines[1]
  assert lines[2].startswith('mesh=') and 'one device' in lines[2]
  assert lines[3] == 'runs on {CpuDevice(id=5)}'
  assert lines[4] == '16'
  assert 'must be on cpu:5' in lines[5]


def test_the_public_names():
  assert sarathi_jax.LLM is llm_lib.LLM
  assert sarathi_jax.SamplingParams is types.SamplingParams


def test_sampling_that_nobody_gave_is_what_the_makers_recommend(
    make_llm, params, greedy):
  recommended = dict(temperature=0.0, max_tokens=6)
  llm = make_llm(params, default_sampling=recommended)
  assert tokens_of(llm.generate(PROMPTS)) == greedy['old']
  with pytest.raises(errors.InvalidRequestError, match='temperature=-1'):
    make_llm(params, default_sampling=dict(temperature=-1))
