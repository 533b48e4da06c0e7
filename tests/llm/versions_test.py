# SPDX-License-Identifier: Apache-2.0
"""New weights at any time: whose each token is, and that it is theirs."""

from __future__ import annotations

import itertools
import random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sarathi_jax import errors
from sarathi_jax import models
from sarathi_jax import types
from tests import tiny
from tests.llm import common

GREEDY, PROMPTS = common.GREEDY, common.PROMPTS
Span = types.VersionSpan
MODEL = tiny.MODEL


@pytest.fixture(scope='module')
def weights() -> list[Any]:
  return [tiny.make_params(seed) for seed in range(3)]


class Witness:
  """Notes by which weights the cache has each token of each sequence.

  Of what is found there, by none but those that are served: that is expected,
  and what the tokens are held to.
  """

  def __init__(self, llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    self.llm = llm
    self.cached: dict[str, list[int]] = {}
    self.sampled: dict[str, dict[int, tuple[int, list[int]]]] = {}
    launch = llm._runner.launch
    monkeypatch.setattr(
      llm._runner, 'launch', lambda batch: self.note(batch) or launch(batch)
    )

  def note(self, batch: types.ScheduledBatch) -> None:
    version = self.llm.engine.weight_version
    for key in batch.preempted:
      self.cached.pop(key, None)
    for chunk in batch.chunks:
      cached = self.cached.setdefault(chunk.request_id, [])
      if not cached or chunk.start < len(cached):  # It begins, or again.
        cached[:] = [version] * chunk.start
      assert len(cached) == chunk.start
      cached += [version] * chunk.num_tokens
      if chunk.samples:
        end = chunk.start + chunk.num_tokens
        sampled = self.sampled.setdefault(chunk.request_id, {})
        sampled[end] = version, list(cached)


@jax.jit
def recompute_one(
  params: Any, kv: Any, token: jax.Array, position: jax.Array
) -> Any:
  """Returns the cache with one more token, and what may come after it."""

  def attend(
    layer_kv: Any, q: Any, k: Any, v: Any, *, options: Any, **rest: Any
  ) -> Any:
    keys, values = (
      jax.lax.dynamic_update_slice_in_dim(all_of, one, position, 0)
      for all_of, one in zip(layer_kv, (k, v), strict=True)
    )
    out, _ = models.causal_attend(
      None, q, keys, values, options=options, rows=position[None]
    )
    return out, (keys, values)

  hidden, kv = models.forward(
    MODEL, params, kv, token[None], position[None], None, attend
  )
  return kv, jax.nn.log_softmax(models.unembed(MODEL, params, hidden))[0]


def expected(weights: list[Any], tokens: list[int], by: list[int]) -> Any:
  """Returns the log-probabilities after tokens, each of weights of its own."""
  shape = MODEL.max_position_embeddings, MODEL.num_kv_heads, MODEL.head_dim
  kv = [(jnp.zeros(shape), jnp.zeros(shape))] * MODEL.num_layers
  for position, (token, version) in enumerate(zip(tokens, by, strict=True)):
    kv, logprobs = recompute_one(
      weights[version % len(weights)],
      kv,
      np.int32(token),
      np.int32(position),
    )
  return np.asarray(logprobs)


class Read:
  """A stream, and what it has told so far."""

  def __init__(self, llm: Any, prompt: list[int], num_tokens: int) -> None:
    self.prompt = prompt
    self.deltas: list[types.OutputDelta] = []
    self.stream = llm.stream(
      prompt, types.SamplingParams(temperature=0, max_tokens=num_tokens)
    )

  def next(self) -> bool:
    self.deltas += itertools.islice(self.stream, 1)
    return self.deltas[-1].finish_reason is None

  def check(self, witness: Witness, weights: list[Any]) -> None:
    tokens = [t for delta in self.deltas for t in delta.token_ids]
    logprobs = [p for delta in self.deltas for p in delta.logprobs]
    versions = [
      span.version
      for span in types.versions_of(self.deltas)
      for _ in range(span.num_tokens)
    ]
    sampled = witness.sampled[self.deltas[0].request_id]
    for i, (token, logprob, version) in enumerate(
      zip(tokens, logprobs, versions, strict=True)
    ):
      by, cached = sampled[len(self.prompt) + i]
      assert version == by == cached[-1]
      all_of = expected(weights, self.prompt + tokens[:i], cached)
      np.testing.assert_allclose(logprob, all_of[token], atol=1e-4)
      np.testing.assert_allclose(all_of.max(), all_of[token], atol=1e-4)


@pytest.fixture(scope='module')
def shared(make_llm, weights):
  """Pages are few, so that what runs is preempted, too."""
  return make_llm(
    weights[0], page_size=4, num_pages=18, max_model_len=64, **tiny.STEPS_ALONE
  )


@pytest.mark.parametrize('seed', range(6))
def test_versions_are_exact_under_random_updates(
  seed, shared, weights, monkeypatch
):
  """Each token is told to be by the weights that it was sampled by.

  And it attends to what those weights made of the tokens before it that the
  cache has, or others, where it keeps them; never to what others left there.
  """
  rng = random.Random(seed)
  llm = shared
  witness = Witness(llm, monkeypatch)
  beginning = [rng.randrange(300) for _ in range(12)]
  going: list[Read] = []
  reads: list[Read] = []
  while len(reads) < 8 or going:
    what = rng.random()
    if what < 0.25 and len(reads) < 8:
      own = [rng.randrange(300) for _ in range(rng.randrange(1, 8))]
      prompt = beginning[: rng.choice((0, 8, 12))] + own
      going.append(Read(llm, prompt, rng.randrange(1, 12)))
      reads.append(going[-1])
    elif what < 0.4:
      on_update = rng.choice(('recompute', 'keep'))
      version = llm.engine.weight_version + 1
      llm.update_params(weights[version % len(weights)], on_update=on_update)
      if on_update == 'recompute':
        witness.cached.clear()
    elif going:
      read = rng.choice(going)
      if not read.next():
        going.remove(read)
  for read in reads:
    read.check(witness, weights)
  spans = [types.versions_of(read.deltas) for read in reads]
  assert max(map(len, spans)) > 1
  kept = [c for s in witness.sampled.values() for _, c in s.values()]
  assert any(len(set(cached)) > 1 for cached in kept) or seed


def test_a_completion_tells_its_versions(llm, params, new_params):
  """By numbers of ours, or of the trainer's."""
  start = llm.engine.weight_version
  (done,) = llm.generate([5], GREEDY)
  assert done.versions == (Span(start, 6),)
  llm.update_params(new_params)
  (done,) = llm.generate([5], GREEDY)
  assert done.versions == (Span(start + 1, 6),)
  llm.update_params(params, version=70)
  stream = llm.stream([5], GREEDY)
  deltas = list(itertools.islice(stream, 2))
  llm.update_params(new_params, version=72, on_update='keep')
  deltas += stream
  first, second = types.versions_of(deltas)
  assert first.version == 70 and second == Span(72, 6 - first.num_tokens)


def test_what_is_kept_is_nobody_elses(llm, params, new_params, greedy):
  """Not in what it computes later, either; nor is who waits for it hung."""
  prompt = PROMPTS[2]
  stream = llm.stream(
    prompt, types.SamplingParams(temperature=0, max_tokens=20)
  )
  deltas = [next(stream)]
  llm.update_params(new_params, on_update='keep')
  (done,) = llm.generate([prompt], GREEDY)
  assert done.token_ids == greedy['new'][2]
  assert done.metrics.num_cached_tokens == 0
  deltas += stream
  assert deltas[-1].metrics.num_preemptions == 0
  tokens = [t for delta in deltas for t in delta.token_ids]
  (after,) = llm.generate([prompt + tokens[:12]], GREEDY)
  fresh = llm.reset_prefix_cache() and llm.generate(
    [prompt + tokens[:12]], GREEDY
  )
  assert after.token_ids == fresh[0].token_ids
  np.testing.assert_allclose(after.logprobs, fresh[0].logprobs, atol=1e-5)


@pytest.mark.parametrize(
  ('options', 'says'),
  [
    (dict(on_update='restart'), "on_update='restart': must be one of recompu"),
    (dict(version=-1), 'version=-1: must be an integer >= 0'),
    (dict(version=1.5), 'version=1.5: must be an integer >= 0'),
  ],
)
def test_what_is_no_update_is_refused(llm, params, options, says):
  version = llm.engine.weight_version
  with pytest.raises(errors.ConfigError, match=says):
    llm.update_params(params, **options)
  assert llm.engine.weight_version == version
