# SPDX-License-Identifier: Apache-2.0
"""Rotary embeddings against transformers' own tables, far out."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.models.llama import modeling_llama
from transformers.models.phi3 import modeling_phi3

from pallas_kernels import rotate_and_write
from sarathi_jax.models import config as config_lib
from sarathi_jax.models import rope

_POSITIONS = (0, 1, 63, 64, 4095, 4096, 8192, 100_000)

_KINDS: dict[str, dict[str, Any]] = {
  'default': dict(),
  'linear': dict(factor=4.0),
  'llama3': dict(
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position=4096,
  ),
  'yarn': dict(
    factor=4.0,
    original_max_position=4096,
    beta_fast=32,
    beta_slow=1,
    attention_factor=1.25,
    truncate=True,
  ),
}


def _theirs(
  kind: str,
  numbers: dict[str, Any],
  head_dim: int,
  theta: float,
  positions: Any,
) -> tuple[np.ndarray, np.ndarray]:
  names = dict(numbers)
  if 'original_max_position' in names:
    names['original_max_position_embeddings'] = names.pop(
      'original_max_position'
    )
  config = transformers.LlamaConfig(
    head_dim=head_dim,
    max_position_embeddings=8192,
    rope_parameters=dict(rope_type=kind, rope_theta=theta, **names),
  )
  embedding = modeling_llama.LlamaRotaryEmbedding(config)
  cos, sin = embedding(torch.zeros(1), torch.tensor([list(positions)]))
  half = head_dim // 2
  return cos[0, :, :half].numpy(), sin[0, :, :half].numpy()


@pytest.mark.parametrize('kind', _KINDS)
@pytest.mark.parametrize('head_dim', [64, 80, 128])
@pytest.mark.parametrize('theta', [10000.0, 1e6])
def test_tables(kind: str, head_dim: int, theta: float) -> None:
  numbers = _KINDS[kind]
  config = config_lib.RopeConfig(theta=theta, kind=kind, **numbers)
  ours = rope.tables(config, head_dim, jnp.asarray(_POSITIONS), None)
  theirs = _theirs(kind, numbers, head_dim, theta, _POSITIONS)
  for table, expected in zip(ours, theirs, strict=True):
    assert table.dtype == jnp.float32
    # A unit in the last place of a frequency is 0.01 at position 100,000.
    np.testing.assert_allclose(table, expected, atol=0.02)
    np.testing.assert_allclose(table[:5], expected[:5], atol=5e-4)


@pytest.mark.parametrize('length', [1, 64, 65, 200])
def test_dynamic_uses_the_length_it_is_given(length: int) -> None:
  """Every token has its own base, for the length in `rope_lens`."""
  config = config_lib.RopeConfig(
    kind='dynamic', factor=4.0, original_max_position=64
  )
  positions = np.arange(length, dtype=np.int32)
  ours = rope.tables(
    config, 16, jnp.asarray(positions), jnp.full(length, length, jnp.int32)
  )
  hf_config = transformers.LlamaConfig(
    head_dim=16,
    max_position_embeddings=64,
    rope_parameters=dict(rope_type='dynamic', rope_theta=10000.0, factor=4.0),
  )
  embedding = modeling_llama.LlamaRotaryEmbedding(hf_config)
  cos, sin = embedding(torch.zeros(1), torch.from_numpy(positions)[None])
  np.testing.assert_allclose(ours[0], cos[0, :, :8], atol=1e-4)
  np.testing.assert_allclose(ours[1], sin[0, :, :8], atol=1e-4)


@pytest.mark.parametrize('length', [64, 65])
def test_longrope_has_two_sets_of_frequencies(length: int) -> None:
  """All tokens have that for the sequence's length, as in transformers."""
  short, long = (1.0, 1.25, 1.5, 2.0), (2.0, 4.5, 9.0, 30.0)
  positions = np.arange(length, dtype=np.int32)
  hf_config = transformers.Phi3Config(
    hidden_size=16,
    num_attention_heads=1,
    max_position_embeddings=256,
    original_max_position_embeddings=64,
    partial_rotary_factor=0.5,
    rope_parameters=dict(
      rope_type='longrope', short_factor=list(short), long_factor=list(long)
    ),
  )
  embedding = modeling_phi3.Phi3RotaryEmbedding(hf_config)
  cos, sin = embedding(torch.zeros(1), torch.from_numpy(positions)[None])
  config = config_lib.RopeConfig(
    kind='longrope',
    rotary_dim=8,
    original_max_position=64,
    attention_factor=embedding.attention_scaling,
    short_factors=short,
    long_factors=long,
  )
  assert config.attention_factor == pytest.approx(
    (1 + math.log(4) / math.log(64)) ** 0.5
  )
  ours = rope.tables(
    config, 16, jnp.asarray(positions), jnp.full(length, length, jnp.int32)
  )
  np.testing.assert_allclose(ours[0], cos[0, :, :4], atol=1e-5)
  np.testing.assert_allclose(ours[1], sin[0, :, :4], atol=1e-5)


def test_no_rotation_is_one_by_nothing() -> None:
  """Bit by bit, so that layers with and without are of one shape."""
  rotation = rope.tables(
    config_lib.RopeConfig(kind='none', rotary_dim=4), 8, jnp.arange(9), None
  )
  x = jax.random.normal(jax.random.key(0), (9, 2, 8), jnp.bfloat16)
  np.testing.assert_array_equal(rotate_and_write.turn(x, rotation, None), x)


def test_queries_grow_with_each_original_context() -> None:
  config = config_lib.LlamaConfig(
    vocab_size=8,
    hidden_size=8,
    intermediate_size=8,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
    max_position_embeddings=8,
    rope=config_lib.RopeConfig(
      kind='dynamic', factor=2.0, original_max_position=4
    ),
    query_growth=0.1,
  )
  factors = rope.query_factors(config, jnp.array([0, 3, 4, 7, 8]))
  np.testing.assert_allclose(
    factors, 1 + 0.1 * np.log([1, 1, 2, 2, 3]), atol=1e-6
  )


def test_dynamic_needs_lengths() -> None:
  config = config_lib.RopeConfig(
    kind='dynamic', factor=4.0, original_max_position=64
  )
  with pytest.raises(ValueError, match='rope_lens=None'):
    rope.tables(config, 16, jnp.arange(3), None)


def test_pairs_are_rotated_and_the_rest_is_left() -> None:
  """A quarter turn of pairs (0, 2) and (1, 3) of a head of 6."""
  cos, sin = jnp.zeros((1, 2)), jnp.ones((1, 2))
  x = jnp.asarray([[[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]], jnp.bfloat16)
  turned = rotate_and_write.turn(x, (cos, sin), None)
  assert turned.dtype == jnp.bfloat16
  assert turned[0, 0].tolist() == [-3.0, -4.0, 1.0, 2.0, 5.0, 6.0]


def test_partial_rotation_has_the_frequencies_of_its_width() -> None:
  positions = jnp.arange(5)
  partial = rope.tables(
    config_lib.RopeConfig(rotary_dim=8), 32, positions, None
  )
  whole = rope.tables(config_lib.RopeConfig(), 8, positions, None)
  np.testing.assert_array_equal(partial[0], whole[0])
