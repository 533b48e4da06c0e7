# SPDX-License-Identifier: Apache-2.0
"""OLMo-2: Llama with norms behind attention and MLP, and of all of q and k."""

from __future__ import annotations

from typing import Any

from checkpoints_convert import hf_config
from checkpoints_convert.families import llama
from sarathi_jax.models import config as config_lib

_NORM_RULES = llama.norms(
  {
    'post_attention_layernorm': 'attn_out_norm',
    'post_feedforward_layernorm': 'mlp_out_norm',
    'self_attn.q_norm': 'attn.q_wide_norm',
    'self_attn.k_norm': 'attn.k_wide_norm',
  }
)


def read_config(attributes: hf_config.Attributes) -> config_lib.LlamaConfig:
  """Reads what transformers' Olmo2Config reads, with its defaults."""
  return config_lib.LlamaConfig(
    **switches(attributes),
    **hf_config.common(
      attributes, kv_heads=None, theta=10000.0, eps=1e-5, positions=2048
    ),
  )


def switches(attributes: hf_config.Attributes) -> dict[str, Any]:
  """Takes what tells OLMo's layers from Llama's; returns the fields."""
  bias = attributes.flag('attention_bias', False)
  return dict(
    norms='after',
    qk_norm=True,
    qk_norm_is_wide=True,
    qkv_bias=bias,
    o_bias=bias,
  )


def rules(config: config_lib.LlamaConfig) -> tuple[Any, ...]:
  """Returns the `rules.Rule` of each tensor: the same for every config."""
  del config
  return llama.TOP_RULES + llama.ATTENTION_RULES + llama.MLP_RULES + _NORM_RULES
