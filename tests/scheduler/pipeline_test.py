# SPDX-License-Identifier: Apache-2.0
"""A pipeline's stages are full, and even, under load: counted, not timed."""

from __future__ import annotations

import dataclasses
import pathlib

import pytest

from sarathi_jax import config as config_lib
from sarathi_jax import errors
from sarathi_jax import types
from sarathi_jax.benchmarks import pipeline
from sarathi_jax.models import facts
from sarathi_jax.models import published
from tests.scheduler import checker as checker_lib

TILE = 128  # tokens, of a matmul on GPUs


def run(
  policy: str, num_stages: int, requests: list[types.Request], **fields: float
) -> tuple[list[pipeline.Load], list[pipeline.Load]]:
  return pipeline.run(
    config_lib.SchedulerConfig(
      **{
        'token_budget': 512,
        'max_num_seqs': 512,
        'max_model_len': 8192,
        'num_pages': 512 * 128,
        'page_size': 64,
        'num_stages': num_stages,
        'prefix_cache': False,
        **fields,
      }
    ),
    policy,
    requests,
  )


@pytest.mark.parametrize('num_stages', [2, 3, 4])
def test_under_load_stages_are_full_and_even(num_stages):
  requests = pipeline.chat_requests(200, seed=1)
  found = pipeline.count(run('sarathi', num_stages, requests)[0])
  assert found.steps > 100
  assert found.bubbles == 0
  assert found.largest_gap <= TILE


@pytest.mark.parametrize('num_stages', [2, 4])
def test_the_baseline_shows_bubbles_in_the_same_trace(num_stages):
  requests = pipeline.chat_requests(200, seed=1)
  found = pipeline.count(run('vllm', num_stages, requests)[0])
  assert found.largest_gap > 4 * TILE
  assert found.idle > 0.25


@pytest.mark.parametrize('policy,gap', [('sarathi', 3), ('vllm', 61)])
def test_decodes_that_began_together_are_spread(policy, gap):
  """61 of them in four stages: 16 in three and 13 in one, or all in one."""
  requests = [
    dataclasses.replace(
      request,
      prompt_token_ids=(1,) * 8,
      sampling=types.SamplingParams(max_tokens=100, ignore_eos=True),
    )
    for request in pipeline.chat_requests(61, seed=0)
  ]
  _, loads = run(policy, 4, requests)
  found = pipeline.count(loads[30:200])
  assert found.largest_gap == gap


def test_chunks_shrink_as_their_context_grows():
  """As much as attention to it costs, so that each takes the same time."""
  checker = checker_lib.make_checker(
    'sarathi',
    config_lib.SchedulerConfig(
      token_budget=512,
      max_num_seqs=4,
      max_model_len=8192,
      num_pages=512,
      page_size=64,
      num_stages=2,
      prefix_cost=1 / 4096,
    ),
  )
  checker.add(checker_lib.make_request('long', 8000, 4))
  chunks = []
  while len(chunks) < 12:
    (chunk,) = checker.schedule().chunks
    chunks.append(chunk)
    checker.complete()
  assert chunks[0].num_tokens == 512
  for chunk in chunks:
    assert chunk.num_tokens == int(512 / (1 + chunk.start / 4096))


def test_what_context_costs_is_that_of_attention():
  """At half of a Mistral's prefix_cost tokens, half of a token's cost."""
  model = published.MODELS['mistral-7b']
  linear = 4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336
  cost = facts.prefix_cost(model, 2)
  assert cost == pytest.approx(2 * 32 * 128 / linear)
  assert facts.prefix_cost(model, 1) == 0
  half = dataclasses.replace(
    model, sliding_window=9, window_layers=tuple(range(16))
  )
  assert facts.prefix_cost(half, 2) == pytest.approx(cost / 2)


def test_the_plot_says_what_it_shows(tmp_path: pathlib.Path):
  requests = pipeline.chat_requests(12, seed=0)
  path = tmp_path / 'bubbles.svg'
  pipeline.plot(
    str(path),
    {
      policy: run(policy, 2, requests, max_num_seqs=8, token_budget=64)[0]
      for policy in ('sarathi', 'vllm')
    },
  )
  text = path.read_text()  # SVG keeps texts as comments.
  for words in ('simulated', 'policy sarathi', 'policy vllm'):
    assert words in text


def test_too_few_requests_to_keep_any_waiting():
  loads, _ = run('vllm', 4, pipeline.chat_requests(1, seed=0))
  with pytest.raises(errors.ConfigError, match='num_requests: too few'):
    pipeline.count(loads)
