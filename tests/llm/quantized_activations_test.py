# SPDX-License-Identifier: Apache-2.0
"""Activations in fp8 are each token's own, however its prompt is cut."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints_convert import convert
from sarathi_jax import LLM
from sarathi_jax import SamplingParams
from sarathi_jax import checkpoint
from sarathi_jax import errors
from sarathi_jax import models
from sarathi_jax.models import config as config_lib
from sarathi_jax.models import quantization as quantization_lib
from sarathi_jax.models import quantized
from tests import naive
from tests import tiny
from tests.checkpoints_convert import fake_checkpoint as fake

PROMPTS = [[1, 2, 3, 4, 5], [9, 8], [*range(3, 28), *range(3, 8)]]
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
MOST = 448  # the largest number of e4m3


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rounding:
  """A matrix of plain numbers that rounds what it multiplies.

  As compressed-tensors says what FP8_DYNAMIC means: numbers are taken to codes
  and back, and multiplied as numbers.

  Attributes:
    parts: the devices that share its rows, each of which has scales of its own.
  """

  matrix: Any
  parts: int = dataclasses.field(metadata={'static': True})

  def multiply(self, x: jax.Array, dtype: Any) -> jax.Array:
    out = 0
    for rows, matrix in zip(
      jnp.split(x, self.parts, axis=-1),
      jnp.split(self.matrix, self.parts),
      strict=True,
    ):
      scale = jnp.abs(rows).max(axis=-1, keepdims=True) / MOST
      codes = jnp.clip(rows / scale, -MOST, MOST).astype(jnp.float8_e4m3fn)
      out += (codes.astype(jnp.float32) * scale) @ matrix
    return out.astype(dtype)


def reference(model: Any, params: Any, tokens: list[int], parts: int) -> Any:
  """Log-probabilities [T, V] of a model that rounds, without a cache.

  Args:
    parts: devices that share each layer; 0: nothing is rounded.
  """

  def one(path: Any, node: Any) -> Any:
    if not isinstance(node, quantized.Quantized):
      return node
    matrix = quantized.dequantize(node, jnp.float32)
    if not parts:
      return matrix
    name = jax.tree_util.keystr(path, simple=True, separator='.')
    return Rounding(matrix, parts if name.endswith(('.o', '.down')) else 1)

  params = jax.tree.map_with_path(
    one, params, is_leaf=lambda node: isinstance(node, quantized.Quantized)
  )

  @jax.jit
  def run(params: Any, tokens: Any) -> Any:
    hidden = naive.hidden_of(model, params, tokens)
    return jax.nn.log_softmax(models.unembed(model, params, hidden))

  padded = np.zeros(48, np.int32)
  padded[: len(tokens)] = tokens
  return np.asarray(run(params, padded))[: len(tokens)]


@pytest.fixture(scope='module')
def converted(tmp_path_factory: pytest.TempPathFactory) -> Any:
  folder = tmp_path_factory.mktemp('fp8')
  fake.llama(folder / 'hf', max_position_embeddings=64)
  convert.convert(folder / 'hf', folder / 'out', quantize='fp8')
  return folder / 'out'


MIXTURE = config_lib.MixtralConfig(
  vocab_size=64,
  hidden_size=32,
  intermediate_size=48,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  max_position_embeddings=64,
  num_experts=4,
  experts_per_token=2,
  quantization=quantization_lib.Quantization(
    codes='fp8',
    kept=(*quantization_lib.ROUTERS, 'lm_head', 'layers.*.attn.*'),
  ),
)


def engine(**fields: Any) -> Any:
  # A program of one size.
  return tiny.engine_config(token_budget=4, **tiny.STEPS_ALONE, **fields)


@pytest.mark.parametrize('tp', [1, 2])
def test_tokens_are_those_of_a_model_that_rounds(
  converted: Any, tp: int
) -> None:
  """In chunks of eight tokens, from files."""
  model = checkpoint.load_metadata(converted).model
  params = checkpoint.restore_params(converted)
  llm = LLM.from_checkpoint(
    converted, config=engine(tp=tp, quantized_activations='fp8')
  )
  check(llm, model, params, tp)


@pytest.mark.parametrize('tp', [1, pytest.param(2, marks=pytest.mark.slow)])
def test_experts_round_what_they_multiply(tp: int) -> None:
  """What a token is to each of them, and what each is inside."""
  params = models.init_params(MIXTURE, jax.random.key(0), jnp.float32)
  for layer in params['layers']:
    for name in ('gate', 'up', 'down'):  # So that they weigh among the rest.
      node = layer['moe'][name]
      layer['moe'][name] = dataclasses.replace(node, scale=8 * node.scale)
  llm = LLM(
    MIXTURE,
    params,
    eos_token_ids=(),
    config=engine(tp=tp, quantized_activations='fp8'),
  )
  check(llm, MIXTURE, params, tp)


def check(llm: LLM, model: Any, params: Any, tp: int) -> None:
  """Compares tokens, and their log-probabilities, with the reference's."""
  assert llm.model.quantization is not None
  assert llm.model.quantization.activations == 'fp8'
  apart = 0.0
  for prompt, done in zip(PROMPTS, llm.generate(PROMPTS, GREEDY), strict=True):
    tokens = [*prompt, *done.token_ids]
    rounded, plain = (
      reference(model, params, tokens, parts)[len(prompt) - 1 : -1]
      for parts in (tp, 0)
    )
    np.testing.assert_array_equal(rounded.argmax(axis=-1), done.token_ids)
    of_tokens = np.arange(len(done.token_ids)), list(done.token_ids)
    np.testing.assert_allclose(done.logprobs, rounded[of_tokens], atol=1e-4)
    apart = max(apart, np.abs(rounded - plain)[of_tokens].max())
  assert apart > 1e-2, 'proves nothing'


@pytest.mark.parametrize(
  'how,message',
  [
    (None, "the model's are not quantized"),
    (dict(codes='int8'), "the model's are int8 with a scale for each output"),
    (dict(codes='fp8', group=128), 'each output, each 128 inputs'),
  ],
)
def test_other_weights_are_refused_by_name(how: Any, message: str) -> None:
  model = dataclasses.replace(
    tiny.MODEL,
    quantization=how and quantization_lib.Quantization(**how),
  )
  with pytest.raises(
    errors.ConfigError, match=f"quantized_activations='fp8': needs.*{message}"
  ):
    LLM(
      model,
      {},
      eos_token_ids=(),
      config=engine(quantized_activations='fp8'),
    )
