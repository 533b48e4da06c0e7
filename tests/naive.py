# SPDX-License-Identifier: Apache-2.0
"""What an engine's tokens must be: those of recomputing all for each one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sarathi_jax import config as config_lib
from sarathi_jax import models
from sarathi_jax import scheduler as scheduler_lib
from sarathi_jax import types
from sarathi_jax.engine import engine as engine_lib
from sarathi_jax.engine import state
from sarathi_jax.models import config as model_config_lib
from sarathi_jax.runner import sampling as sampling_lib

GREEDY = types.SamplingParams(temperature=0, max_tokens=20)
SEEDED = (
  types.SamplingParams(temperature=0.9, max_tokens=20, seed=2**62 + 1),
  types.SamplingParams(temperature=1.3, top_k=20, seed=-2, max_tokens=14),
  types.SamplingParams(temperature=1.0, top_p=0.8, seed=3, max_tokens=17),
  types.SamplingParams(
    temperature=1.1, min_p=0.05, top_k=40, top_p=0.95, seed=4, max_tokens=9
  ),
)

Tokens = tuple[list[int], list[float]]  # ids, log-probabilities


def make_requests(
  vocab_size: int,
  prompt_lens: Sequence[int],
) -> list[types.Request]:
  """Two of each length, one greedy, one seeded."""
  rng = np.random.default_rng(0)
  return [
    types.Request(
      request_id=f'{name}-{i}',
      sampling=params,
      prompt_token_ids=tuple(rng.integers(0, vocab_size, n).tolist()),
    )
    for i, n in enumerate(prompt_lens)
    for name, params in (('greedy', GREEDY), ('seeded', SEEDED[i % 4]))
  ]


def recompute(
  model: model_config_lib.ModelConfig,
  params: Any,
) -> Callable[[types.Request], Tokens]:
  """Continues a prompt by recomputing everything for each token."""
  max_len = model.max_position_embeddings

  @jax.jit
  def next_token(tokens, length, temperature, top_k, top_p, min_p, seed):
    hidden, _ = models.forward(
      model,
      params,
      [None] * model.num_layers,
      tokens,
      jnp.arange(max_len, dtype=jnp.int32),
      None,
      models.causal_attend,
    )
    logits = models.unembed(model, params, hidden[length - 1][None])
    rows = (temperature, top_k, top_p, min_p, seed, length)
    token, logprob = sampling_lib.sample(logits, *(r[None] for r in rows))
    return token[0], logprob[0]

  def run(request: types.Request) -> Tokens:
    tokens = list(request.prompt_token_ids)
    s = request.sampling
    logprobs = []
    for _ in range(min(s.max_tokens, max_len - len(tokens))):
      padded = np.zeros(max_len, np.int32)
      padded[: len(tokens)] = tokens
      token, logprob = next_token(
        padded,
        np.int32(len(tokens)),
        np.float32(s.temperature),
        np.int32(s.top_k),
        np.float32(s.top_p),
        np.float32(s.min_p),
        np.array([s.seed or 0], np.int64).view(np.int32),
      )
      tokens.append(int(token))
      logprobs.append(float(logprob))
    return tokens[len(request.prompt_token_ids) :], logprobs

  return run


def run_engine(
  runner: Any,
  requests: Sequence[types.Request],
  *,
  vocab_size: int,
  policy: str = 'sarathi',
  **limits: Any,
) -> tuple[dict[str, Tokens], state.EngineStats]:
  """Runs requests on an engine around `runner`.

  Args:
    runner: computes; it may be used by several engines, one by one.
    requests: all added at once.
    vocab_size: of the model.
    policy: of the scheduler.
    **limits: of its SchedulerConfig.
  """
  config = config_lib.SchedulerConfig(**limits)
  scheduler = scheduler_lib.POLICIES[policy](config)
  engine = engine_lib.Engine(
    scheduler,
    runner,
    info=engine_lib.EngineInfo.of(config, policy=policy, vocab_size=vocab_size),
  )
  for request in requests:
    engine.add(request)
  got: dict[str, Tokens] = {r.request_id: ([], []) for r in requests}
  while engine.has_work:
    for delta in engine.step():
      got[delta.request_id][0].extend(delta.token_ids)
      got[delta.request_id][1].extend(delta.logprobs)
  stats = engine.stats()
  assert stats.num_free_pages == config.num_pages
  return got, stats


def assert_same(got: dict[str, Tokens], expected: dict[str, Tokens]) -> None:
  """The same tokens, with the same probabilities but for rounding."""
  assert got.keys() == expected.keys()
  for request_id, (tokens, logprobs) in expected.items():
    assert got[request_id][0] == tokens, request_id
    np.testing.assert_allclose(got[request_id][1], logprobs, atol=2e-4)
