# SPDX-License-Identifier: Apache-2.0
"""GLM-4 of 2025 (0414): that of 2024 with norms on both sides."""

from __future__ import annotations

from typing import Any

from checkpoints_convert import hf_config
from checkpoints_convert.families import glm
from checkpoints_convert.families import llama
from checkpoints_convert.families import phi3
from sarathi_jax.models import config as config_lib

_NORMS = llama.norms(
  {
    'input_layernorm': 'attn_norm',
    'post_self_attn_layernorm': 'attn_out_norm',
    'post_attention_layernorm': 'mlp_norm',
    'post_mlp_layernorm': 'mlp_out_norm',
  }
)


def read_config(attributes: hf_config.Attributes) -> config_lib.LlamaConfig:
  """Reads what transformers' Glm4Config reads, with its defaults."""
  return config_lib.LlamaConfig(norms='around', **glm.fields(attributes))


def rules(config: config_lib.LlamaConfig) -> tuple[Any, ...]:
  """Returns the `rules.Rule` of each tensor; sizes say what is fused."""
  return (
    llama.TOP_RULES
    + _NORMS
    + glm.attention_rules(config)
    + phi3.mlp_rules(config)
  )
