# SPDX-License-Identifier: Apache-2.0
"""The keystone: however a model is run, its tokens are the same.

A tiny float32 model; greedy and seeded sampling. The engine's tokens equal
those of a naive full recompute, under every policy, budget, scarcity of pages
that forces preemptions, and with look-ahead on and off.
"""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sarathi_jax import config as config_lib
from sarathi_jax import models
from sarathi_jax import scheduler as scheduler_lib
from sarathi_jax import types
from sarathi_jax.engine import engine as engine_lib
from sarathi_jax.models import config as model_config_lib
from sarathi_jax.runner import device_runner
from sarathi_jax.runner import sampling as sampling_lib

MODEL = model_config_lib.LlamaConfig(
  vocab_size=97, hidden_size=32, intermediate_size=48, num_layers=2,
  num_heads=4, num_kv_heads=2, head_dim=16, max_position_embeddings=96,
  sliding_window=40)
MAX_LEN = MODEL.max_position_embeddings
MAX_SEQS = 8
PAGE_SIZE = 16
PLENTY, SCARCE = MAX_SEQS * MAX_LEN // PAGE_SIZE, 10
UNLIMITED = 2 * MAX_LEN
NUM_REQUESTS = 12

GREEDY = types.SamplingParams(temperature=0, max_tokens=20)
SEEDED = (
  types.SamplingParams(temperature=0.9, max_tokens=20, seed=1),
  types.SamplingParams(temperature=1.3, top_k=20, seed=2, max_tokens=14),
  types.SamplingParams(temperature=1.0, top_p=0.8, seed=3, max_tokens=17),
  types.SamplingParams(
    temperature=1.1, min_p=0.05, top_k=40, top_p=0.95, seed=4, max_tokens=9))


@pytest.fixture(scope='module')
def params() -> Any:
  return models.init_params(MODEL, jax.random.key(0), jnp.float32, scale=0.3)


def make_runner(params, attention: str) -> device_runner.DeviceRunner:
  config = config_lib.EngineConfig(
    token_budget=UNLIMITED, max_num_seqs=MAX_SEQS, page_size=PAGE_SIZE,
    num_pages=PLENTY, attention=attention)
  return device_runner.DeviceRunner(
    MODEL, params, config, lambda max_model_len: UNLIMITED + MAX_SEQS)


@pytest.fixture(scope='module')
def runner(params) -> device_runner.DeviceRunner:
  """One for all cases: schedulers differ, compiled steps don't."""
  return make_runner(params, 'xla')


@pytest.fixture(scope='module')
def kernel_runner(params) -> device_runner.DeviceRunner:
  """With the GPU's kernel, interpreted: slow, so for some cases."""
  return make_runner(params, 'pallas_triton')


@pytest.fixture(scope='module')
def naive(params):
  """Continues a prompt by recomputing everything for each token."""
  @jax.jit
  def next_token(tokens, length, temperature, top_k, top_p, min_p, seed):
    hidden, _ = models.forward(
      MODEL, params, [None] * MODEL.num_layers, tokens,
      jnp.arange(MAX_LEN, dtype=jnp.int32), None, models.causal_attend)
    logits = models.unembed(MODEL, params, hidden[length - 1][None])
    rows = (temperature, top_k, top_p, min_p, seed, length)
    token, logprob = sampling_lib.sample(logits, *(r[None] for r in rows))
    return token[0], logprob[0]

  def run(request: types.Request) -> tuple[list[int], list[float]]:
    tokens = list(request.prompt_token_ids)
    s = request.sampling
    logprobs = []
    for _ in range(min(s.max_tokens, MAX_LEN - len(tokens))):
      padded = np.zeros(MAX_LEN, np.int32)
      padded[:len(tokens)] = tokens
      token, logprob = next_token(
        padded, np.int32(len(tokens)), np.float32(s.temperature),
        np.int32(s.top_k), np.float32(s.top_p), np.float32(s.min_p),
        np.int32(s.seed or 0))
      tokens.append(int(token))
      logprobs.append(float(logprob))
    return tokens[len(request.prompt_token_ids):], logprobs

  return run


@pytest.fixture(scope='module')
def requests() -> list[types.Request]:
  rng = np.random.default_rng(0)
  lengths = [1, 2, 7, 8, 9, 90, 33, 60, 16, 75, 5, 41]
  return [
    types.Request(
      request_id=f'{name}-{i}', sampling=params,
      prompt_token_ids=tuple(rng.integers(0, MODEL.vocab_size, n).tolist()))
    for i, n in enumerate(lengths)
    for name, params in (('greedy', GREEDY), ('seeded', SEEDED[i % 4]))]


@pytest.fixture(scope='module')
def expected(naive, requests):
  return {r.request_id: naive(r) for r in requests}


def run_engine(runner, requests, *, policy, token_budget, num_pages,
               look_ahead):
  scheduler = scheduler_lib.POLICIES[policy](config_lib.SchedulerConfig(
    token_budget=token_budget, max_num_seqs=MAX_SEQS, max_model_len=MAX_LEN,
    num_pages=num_pages, page_size=PAGE_SIZE, look_ahead=look_ahead))
  engine = engine_lib.Engine(scheduler, runner, info=engine_lib.EngineInfo(
    model_name='', family='', vocab_size=MODEL.vocab_size,
    max_model_len=MAX_LEN, eos_token_ids=(), policy=policy,
    token_budget=token_budget, max_num_seqs=MAX_SEQS, num_pages=num_pages,
    page_size=PAGE_SIZE))
  for request in requests:
    engine.add(request)
  got = {r.request_id: ([], []) for r in requests}
  while engine.has_work:
    for delta in engine.step():
      got[delta.request_id][0].extend(delta.token_ids)
      got[delta.request_id][1].extend(delta.logprobs)
  stats = engine.stats()
  assert stats.num_free_pages == num_pages
  return got, stats


@pytest.mark.parametrize(
  'policy,token_budget,num_pages,look_ahead',
  list(itertools.product(
    scheduler_lib.POLICIES, (MAX_SEQS, 17, 64, UNLIMITED), (PLENTY, SCARCE),
    (True, False))))
def test_tokens_do_not_depend_on_how_they_are_computed(
    runner, requests, expected, policy, token_budget, num_pages, look_ahead):
  got, stats = run_engine(
    runner, requests, policy=policy, token_budget=token_budget,
    num_pages=num_pages, look_ahead=look_ahead)
  for request_id, (tokens, logprobs) in expected.items():
    assert got[request_id][0] == tokens, request_id
    np.testing.assert_allclose(got[request_id][1], logprobs, atol=2e-4)
  reserves = policy in ('orca', 'faster_transformer')  # Never preempt.
  if num_pages == SCARCE and not reserves:
    assert stats.num_preemptions > 0


@pytest.mark.parametrize('token_budget,num_pages,look_ahead', [
  (MAX_SEQS, SCARCE, True), (17, SCARCE, False), (64, PLENTY, True)])
def test_the_kernel_computes_the_same(
    kernel_runner, requests, expected, token_budget, num_pages, look_ahead):
  test_tokens_do_not_depend_on_how_they_are_computed(
    kernel_runner, requests, expected, 'sarathi', token_budget, num_pages,
    look_ahead)


def test_outputs_are_lively(expected):
  """Or equality would prove little: a dull model repeats itself."""
  for tokens, _ in expected.values():
    assert len(set(tokens)) > len(tokens) / 3


def test_a_nudged_weight_is_noticed(params, requests, expected):
  """The negative control."""
  nudged = jax.tree.map(lambda x: x, params)
  nudged['layers'][1]['mlp']['up'] = (
    nudged['layers'][1]['mlp']['up'].at[0, 0].add(1.0))
  config = config_lib.EngineConfig(
    token_budget=64, max_num_seqs=MAX_SEQS, page_size=PAGE_SIZE,
    num_pages=PLENTY)
  runner = device_runner.DeviceRunner(
    MODEL, nudged, config, lambda max_model_len: 64)
  got, _ = run_engine(
    runner, requests, policy='sarathi', token_budget=64, num_pages=PLENTY,
    look_ahead=True)
  assert any(got[r][0] != tokens for r, (tokens, _) in expected.items())
