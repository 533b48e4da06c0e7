# SPDX-License-Identifier: Apache-2.0
"""What the tests of LLM share."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from sarathi_jax import models
from sarathi_jax import types
from tests import tiny

GREEDY = types.SamplingParams(temperature=0, max_tokens=6)
PROMPTS = [[5, 6, 7], [8], list(range(20, 50))]


def all_logprobs(params: Any, tokens: jax.Array) -> jax.Array:
  """[T, V], by a model without a cache."""
  hidden, _ = models.forward(
    tiny.MODEL,
    params,
    [None] * tiny.MODEL.num_layers,
    tokens,
    jnp.arange(len(tokens), dtype=jnp.int32),
    None,
    models.causal_attend,
  )
  return jax.nn.log_softmax(models.unembed(tiny.MODEL, params, hidden))


def tokens_of(done: list[types.Completion]) -> list[tuple[int, ...]]:
  return [c.token_ids for c in done]
