# SPDX-License-Identifier: Apache-2.0
"""Published shapes have as many parameters as their makers say."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import pytest
import transformers

from sarathi_jax import models
from sarathi_jax.models import published

_CARD, _PAPER = "the model's card", "the model's report"
_GGUF = "what llama.cpp prints of the model's file"


class Total(NamedTuple):
  """What is said of a model, in billions.

  Attributes:
    total: its parameters.
    source: who says so.
    active: those that a token goes through.
    looks_up: whether `active` has the embedding, of which a token takes a row.
    layers: those outside of embedding and output matrix.
    is_round: whether `total` is but a round number, right within 1 %.
  """

  total: str
  source: str
  active: str | None = None
  layers: str | None = None
  is_round: bool = False
  looks_up: bool = True


# As many digits as are said count.
SAID = {
  'tinyllama-1.1b': Total('1.1', _CARD),
  'mistral-7b': Total('7.24', _GGUF),
  'yi-34b': Total('34.39', _GGUF),
  'llama2-70b': Total('68.98', _GGUF),
  'falcon-180b': Total('180', _CARD, is_round=True),
  'llama-3.1-8b': Total('8.03', _GGUF),
  'llama-3.1-70b': Total('70.6', _CARD),
  'qwen3-32b': Total('32.8', _CARD, layers='31.2'),
  'olmo-2-7b': Total('7.3', _CARD),
  'olmo-3-32b': Total('32', _CARD),
  'gemma-2-9b': Total('9.24', _GGUF),
  'gemma-3-27b': Total('27.0', _GGUF),
  'phi-4': Total('14.7', _CARD),
  'smollm3-3b': Total('3.1', _CARD),
  # Of GLM-Z1-32B-0414, 613 tensors: none of them a bias of attention.
  'glm-4-32b': Total('32.566', _GGUF, layers='30.704'),
  # Of Granite 3.0, whose shape 3.1 has.
  'granite-3.1-8b': Total('8.17', _GGUF),
  'mistral-small-24b': Total('23.57', _GGUF),
  'mixtral-8x7b': Total('46.7', _PAPER, active='12.9'),
  'qwen3-30b-a3b': Total('30.5', _CARD, active='3.3', layers='29.9'),
  'qwen3-coder-30b-a3b': Total('30.5', _CARD, active='3.3'),
  'qwen3-235b-a22b': Total('235', _CARD, active='22', layers='234'),
  'qwen1.5-moe-a2.7b': Total('14.3', _CARD, active='2.7'),
  'qwen2-57b-a14b': Total('57', _CARD, active='14'),
  'glm-4.5-air': Total(
    '106', _CARD, active='12', is_round=True, looks_up=False
  ),
  'glm-4.5': Total('355', _CARD, active='32', is_round=True, looks_up=False),
  'gpt-oss-20b': Total('20.91', _PAPER, active='3.61', looks_up=False),
  'gpt-oss-120b': Total('116.83', _PAPER, active='5.13', looks_up=False),
}


def test_all_are_here() -> None:
  assert {*SAID} == {*published.MODELS}


@pytest.mark.parametrize('name', published.MODELS)
def test_it_has_as_many_parameters_as_are_said(name: str) -> None:
  model, said = published.MODELS[name], SAID[name]
  specs = models.param_specs(model)
  total = _size(specs)
  if said.is_round:
    assert total / 1e9 == pytest.approx(float(said.total), rel=0.01)
  else:
    _agrees(total, said.total)
  if said.layers is not None:
    _agrees(_size(specs['layers']), said.layers)
  if said.active is not None:
    mlp = model.layer_mlp(model.num_layers - 1)
    leaves = jax.tree.leaves(specs['layers'])
    idle = _size([leaf for leaf in leaves if leaf.is_of_experts])
    idle -= idle * mlp.experts_per_token // mlp.num_experts
    if not said.looks_up:
      idle += _size(specs['embed'])
    active = (total - idle) / 1e9
    last_digit = 10.0 ** -len(said.active.partition('.')[2])
    assert active == pytest.approx(float(said.active), abs=last_digit)


def _size(specs: object) -> int:
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(specs))


def _agrees(count: int, said: str) -> None:
  digits = len(said.partition('.')[2])
  assert f'{count / 1e9:.{digits}f}' == said, count


@pytest.mark.parametrize(
  ('name', 'theirs'),
  [
    ('mistral-7b', transformers.MistralConfig),
    ('mixtral-8x7b', transformers.MixtralConfig),
    ('smollm3-3b', transformers.SmolLM3Config),
    (
      'mistral-small-24b',
      lambda: transformers.Mistral3Config().text_config,
    ),
  ],
)
def test_it_is_what_transformers_takes_for_granted(
  name: str, theirs: object
) -> None:
  """Of the checkpoints that these are the defaults of."""
  model, config = published.MODELS[name], theirs()  # type: ignore[operator]
  for ours, field in (
    ('vocab_size', 'vocab_size'),
    ('hidden_size', 'hidden_size'),
    ('intermediate_size', 'intermediate_size'),
    ('num_layers', 'num_hidden_layers'),
    ('num_heads', 'num_attention_heads'),
    ('num_kv_heads', 'num_key_value_heads'),
  ):
    assert getattr(model, ours) == getattr(config, field), field
