# SPDX-License-Identifier: Apache-2.0
"""Published shapes have as many parameters as their makers say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import math
from typing import Any, NamedTuple

import jax
import pytest
import transformers

from sarathi_jax import models
from sarathi_jax.models import published

_CARD, _PAPER = "the model's card", "the model's report"
_GGUF = "what llama.cpp prints of the model's file"
_FILES = 'what the hub counts in its files'


class Total(NamedTuple):
  """What is said of a model.

  Attributes:
    total: its parameters; a text: in billions, as many digits as are said.
    source: who says so.
    active: those that a token goes through, in billions.
    layers: those outside of embedding and output matrix, in billions.
    looks_up: whether `active` has the embedding, of which a token takes a row.
    beside: what else `total` counts, see `_BESIDE`.
  """

  total: int | str
  source: str
  active: str | None = None
  layers: str | None = None
  looks_up: bool = True
  beside: str | None = None


# What files have beside the parameters -> how many numbers that is, by specs.
_BESIDE: Mapping[str, Callable[[Any], int]] = {
  'an output matrix that is tied': lambda specs: _size(specs['embed']),
  # With an embedding and an output matrix of its own, a matrix that takes two
  # tokens' hidden states, and three norms.
  'a layer that predicts further tokens': lambda specs: (
    _size(specs['layers'][-1])
    + 2 * _size(specs['embed'])
    + 2 * _width(specs) ** 2
    + 3 * _width(specs)
  ),
}

SAID = {
  'tinyllama-1.1b': Total('1.10', _GGUF),
  'mistral-7b': Total(7241732096, _FILES),
  'yi-34b': Total(34388917248, _FILES),
  'llama2-70b': Total(68976648192, _FILES),
  'falcon-180b': Total(
    179522565120, _FILES, beside='an output matrix that is tied'
  ),
  'llama-3.1-8b': Total(8030261248, _FILES),
  'llama-3.1-70b': Total(70553706496, _FILES),
  'qwen3-32b': Total(32762123264, _FILES, layers='31.2'),
  'olmo-2-7b': Total(7298617344, _FILES),
  'olmo-3-32b': Total(32233522176, _FILES),
  'gemma-2-9b': Total(9241705984, _FILES),
  'gemma-3-27b': Total(27009346304, _GGUF),
  'phi-4': Total(14659507200, _FILES),
  'smollm3-3b': Total(3075098624, _FILES),
  # Of GLM-Z1-32B-0414, 613 tensors: none of them a bias of attention.
  'glm-4-32b': Total('32.566', _GGUF, layers='30.704'),
  # Of Granite 3.0, whose shape 3.1 has.
  'granite-3.1-8b': Total('8.17', _GGUF),
  'mistral-small-24b': Total(23572403200, _FILES),
  'mixtral-8x7b': Total(46702792704, _FILES, active='12.9'),
  'qwen3-30b-a3b': Total(30532122624, _FILES, active='3.3', layers='29.9'),
  'qwen3-coder-30b-a3b': Total('30.5', _CARD, active='3.3'),
  'qwen3-235b-a22b': Total(235093634560, _FILES, active='22', layers='234'),
  'qwen1.5-moe-a2.7b': Total(14315784192, _FILES, active='2.7'),
  'qwen2-57b-a14b': Total(57408658944, _FILES, active='14'),
  'glm-4.5-air': Total(
    110468824832,
    _FILES,
    active='12',
    looks_up=False,
    beside='a layer that predicts further tokens',
  ),
  'glm-4.5': Total(
    358337791296,
    _FILES,
    active='32',
    looks_up=False,
    beside='a layer that predicts further tokens',
  ),
  'gpt-oss-20b': Total('20.91', _PAPER, active='3.61', looks_up=False),
  'gpt-oss-120b': Total(116829156672, _FILES, active='5.13', looks_up=False),
}


def test_all_are_here() -> None:
  assert {*SAID} == {*published.MODELS}


@pytest.mark.parametrize('name', published.MODELS)
def test_it_has_as_many_parameters_as_are_said(name: str) -> None:
  # Codes of 4 bits are two in a byte.
  model = dataclasses.replace(published.MODELS[name], quantization=None)
  said, specs = SAID[name], models.param_specs(model)
  total = _size(specs)
  stored = total + (_BESIDE[said.beside](specs) if said.beside else 0)
  if isinstance(said.total, int):
    assert stored == said.total
  else:
    _agrees(stored, said.total)
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


def _width(specs: Any) -> int:
  width: int = specs['embed'].shape[1]
  return width


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
