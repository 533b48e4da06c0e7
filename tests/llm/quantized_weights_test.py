# SPDX-License-Identifier: Apache-2.0
"""Quantized weights are served as what they stand for, from files and live."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from checkpoints_convert import convert
from sarathi_jax import LLM
from sarathi_jax import SamplingParams
from sarathi_jax import checkpoint
from sarathi_jax import errors
from sarathi_jax import models
from sarathi_jax.models import quantized
from tests import tiny
from tests.checkpoints_convert import fake_checkpoint as fake

PROMPTS = [[1, 2, 3, 4, 5], [9, 8], [7] * 11]


def _tokens(llm: LLM) -> list[tuple[int, ...]]:
  done = llm.generate(
    PROMPTS, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
  )
  return [tuple(d.token_ids) for d in done]


def _engine(**fields: Any) -> Any:
  return tiny.engine_config(token_budget=4, **tiny.STEPS_ALONE, **fields)


def _plain(model: Any, params: Any) -> tuple[Any, Any]:
  """The model as if it had never been quantized."""

  def is_quantized(node: Any) -> bool:
    return isinstance(node, quantized.Quantized)

  return dataclasses.replace(model, quantization=None), jax.tree.map(
    lambda node: (
      quantized.dequantize(node, jnp.float32) if is_quantized(node) else node
    ),
    params,
    is_leaf=is_quantized,
  )


def _as_qwix(params: Any) -> Any:
  """The same, as qwix names it."""

  def one(node: Any) -> Any:
    if not isinstance(node, quantized.Quantized):
      return node
    return {'qvalue': node.values, 'scale': node.scale}

  return jax.tree.map(
    one, params, is_leaf=lambda node: isinstance(node, quantized.Quantized)
  )


@pytest.fixture(scope='module')
def converted(tmp_path_factory: pytest.TempPathFactory) -> Any:
  folder = tmp_path_factory.mktemp('quantized')
  fake.llama(folder / 'hf', max_position_embeddings=64)
  convert.convert(folder / 'hf', folder / 'out', quantize='int8')
  return folder / 'out'


def test_tokens_are_those_of_the_dequantized_model(converted: Any) -> None:
  """Read onto two devices, live, and after an update."""
  model = checkpoint.load_metadata(converted).model
  params = checkpoint.restore_params(converted)
  plain = LLM(*_plain(model, params), eos_token_ids=(), config=_engine())
  expected = _tokens(plain)
  assert len(set(sum(expected, ()))) >= 5, 'proves nothing'
  shared = LLM.from_checkpoint(converted, config=_engine(tp=2))
  assert _tokens(shared) == expected
  others = models.init_params(model, jax.random.key(3), scale=0.5)
  live = LLM(model, others, eos_token_ids=(), config=_engine())
  expected_of_others = _tokens(live)
  assert expected_of_others != expected
  live.update_params(params)
  assert _tokens(live) == expected
  live.update_params(others)
  live.update_params(_as_qwix(params))
  assert _tokens(live) == expected
  shared.update_params(others)
  assert _tokens(shared) == expected_of_others
  with pytest.raises(
    errors.ConfigError, match=r'params\.layers\.0\.attn\.k\.scale: missing'
  ):
    live.update_params(_plain(model, params)[1])
  codes = params['lm_head'].values.astype(jnp.float32)
  wide = dataclasses.replace(params['lm_head'], values=codes)
  with pytest.raises(
    errors.ConfigError, match=r'lm_head\.values: is float32.*must be int8'
  ):
    live.update_params(params | {'lm_head': wide})
  assert _tokens(live) == expected
