# SPDX-License-Identifier: Apache-2.0
"""Shapes of published models, as in their config.json. No JAX.

They are for what needs no weights: memory plans, simulations, benchmarks with
random weights. To serve a model, its checkpoint says all this itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sarathi_jax.models import config

_LLAMA_3_1: dict[str, Any] = dict(
  vocab_size=128256,
  head_dim=128,
  num_kv_heads=8,
  max_position_embeddings=131072,
  rope=config.RopeConfig(
    theta=5e5,
    kind='llama3',
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position=8192,
  ),
)

_OLMO: dict[str, Any] = dict(norms='after', qk_norm=True, qk_norm_is_wide=True)

MODELS: Mapping[str, config.ModelConfig] = {
  'tinyllama-1.1b': config.LlamaConfig(
    vocab_size=32000,
    hidden_size=2048,
    intermediate_size=5632,
    num_layers=22,
    num_heads=32,
    num_kv_heads=4,
    head_dim=64,
    max_position_embeddings=2048,
  ),
  # Mistral-7B-Instruct-v0.2: without the sliding window of v0.1.
  'mistral-7b': config.LlamaConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    max_position_embeddings=32768,
    rope=config.RopeConfig(theta=1e6),
  ),
  # Yi-34B-200K: the paper's prompts are longer than the 4096 of Yi-34B.
  'yi-34b': config.LlamaConfig(
    vocab_size=64000,
    hidden_size=7168,
    intermediate_size=20480,
    num_layers=60,
    num_heads=56,
    num_kv_heads=8,
    head_dim=128,
    max_position_embeddings=200000,
    rope=config.RopeConfig(theta=1e7),
  ),
  'llama2-70b': config.LlamaConfig(
    vocab_size=32000,
    hidden_size=8192,
    intermediate_size=28672,
    num_layers=80,
    num_heads=64,
    num_kv_heads=8,
    head_dim=128,
    max_position_embeddings=4096,
  ),
  'falcon-180b': config.FalconConfig(
    vocab_size=65024,
    hidden_size=14848,
    intermediate_size=59392,
    num_layers=80,
    num_heads=232,
    num_kv_heads=8,
    head_dim=64,
    max_position_embeddings=2048,
    activation='gelu',
    num_norms=2,
    tie_word_embeddings=True,
  ),
  'llama-3.1-8b': config.LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    **_LLAMA_3_1,
  ),
  'llama-3.1-70b': config.LlamaConfig(
    hidden_size=8192,
    intermediate_size=28672,
    num_layers=80,
    num_heads=64,
    **_LLAMA_3_1,
  ),
  'qwen3-32b': config.LlamaConfig(
    vocab_size=151936,
    hidden_size=5120,
    intermediate_size=25600,
    num_layers=64,
    num_heads=64,
    num_kv_heads=8,
    head_dim=128,
    max_position_embeddings=40960,
    norm_eps=1e-6,
    qk_norm=True,
    rope=config.RopeConfig(theta=1e6),
  ),
  'olmo-2-7b': config.LlamaConfig(
    vocab_size=100352,
    hidden_size=4096,
    intermediate_size=11008,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    max_position_embeddings=4096,
    norm_eps=1e-6,
    rope=config.RopeConfig(theta=5e5),
    **_OLMO,
  ),
  'olmo-3-32b': config.LlamaConfig(
    vocab_size=100278,
    hidden_size=5120,
    intermediate_size=27648,
    num_layers=64,
    num_heads=40,
    num_kv_heads=8,
    head_dim=128,
    max_position_embeddings=65536,
    norm_eps=1e-6,
    rope=config.RopeConfig(
      theta=5e5,
      kind='yarn',
      factor=8.0,
      original_max_position=8192,
      attention_factor=1.2079441541679836,
      beta_fast=32.0,
      beta_slow=1.0,
      truncate=True,
    ),
    sliding_window=4096,
    window_layers=tuple(i for i in range(64) if i % 4 != 3),
    window_rope=config.RopeConfig(theta=5e5),
    **_OLMO,
  ),
  'mixtral-8x7b': config.MixtralConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    max_position_embeddings=32768,
    rope=config.RopeConfig(theta=1e6),
    num_experts=8,
    experts_per_token=2,
  ),
}
