# SPDX-License-Identifier: Apache-2.0
"""Weights that are not finite end the requests that they reach, alone."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from sarathi_jax import types
from tests.llm import common

_GREEDY = common.GREEDY
_DRAWN = types.SamplingParams(temperature=1.0, seed=3, max_tokens=6, top_k=9)


@pytest.mark.parametrize('sampling', [_GREEDY, _DRAWN])
@pytest.mark.parametrize('bad', [jnp.nan, jnp.inf])
def test_one_token_whose_embedding_is_not_finite(llm, params, bad, sampling):
  """A prompt that holds it gets no token; the batch beside it all of them."""
  good = [[5, 6, 7], [8], list(range(20, 50))]
  expected = llm.generate(good, sampling)
  unused = next(
    token
    for token in range(100, 300)
    if all(token not in done.token_ids for done in expected)
  )
  llm.update_params({**params, 'embed': params['embed'].at[unused, 3].set(bad)})
  ruined = [[5, unused, 7], [unused]]
  done = llm.generate([ruined[0], *good, ruined[1]], sampling)
  for broken in (done[0], done[-1]):
    assert broken.finish_reason is types.FinishReason.ERROR
    assert broken.token_ids == broken.logprobs == ()
    assert broken.text == ''
  assert common.tokens_of(done[1:-1]) == common.tokens_of(expected)
  # What they left in the cache is not read by who gets their pages.
  for _ in range(3):
    assert common.tokens_of(llm.generate(good, sampling)) == (
      common.tokens_of(expected)
    )


def test_a_matrix_with_a_nan_ends_every_request(llm, params):
  layers = [dict(layer) for layer in params['layers']]
  layers[0]['mlp'] = {
    **layers[0]['mlp'],
    'down': (layers[0]['mlp']['down'].at[0, 0].set(jnp.nan)),
  }
  llm.update_params({**params, 'layers': layers})
  for done in llm.generate(common.PROMPTS, _DRAWN):
    assert done.finish_reason is types.FinishReason.ERROR
