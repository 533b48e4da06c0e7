# SPDX-License-Identifier: Apache-2.0
"""Qwen3: Llama with normalized heads of q and k."""

from __future__ import annotations

from typing import Any

from checkpoints_convert import hf_config
from checkpoints_convert.families import llama
from checkpoints_convert.families import qwen2
from sarathi_jax.models import config as config_lib

NORM_RULES = llama.norms(
  {f'self_attn.{name}_norm': f'attn.{name}_norm' for name in 'qk'}
)


def read_config(attributes: hf_config.Attributes) -> config_lib.LlamaConfig:
  """Reads what transformers' Qwen3Config reads, with its defaults."""
  fields = hf_config.common(
    attributes,
    kv_heads=32,
    theta=10000.0,
    eps=1e-6,
    positions=32768,
    head_dim=128,
  )
  bias = attributes.flag('attention_bias', False)
  return config_lib.LlamaConfig(
    qk_norm=True,
    qkv_bias=bias,
    o_bias=bias,
    **qwen2.with_windows(attributes, fields),
  )


def rules(config: config_lib.LlamaConfig) -> tuple[Any, ...]:
  """Returns Llama's rules, and those of the norms of q and k."""
  return llama.rules(config) + NORM_RULES
