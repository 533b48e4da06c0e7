# SPDX-License-Identifier: Apache-2.0
"""Granite 3: Llama with four factors."""

from __future__ import annotations

from typing import Any

from checkpoints_convert import hf_config
from checkpoints_convert.families import llama
from sarathi_jax.models import config as config_lib

rules = llama.rules


def read_config(attributes: hf_config.Attributes) -> config_lib.LlamaConfig:
  """Reads what transformers' GraniteConfig reads, with its defaults."""
  return config_lib.LlamaConfig(
    mlp_bias=attributes.flag('mlp_bias', False), **fields(attributes)
  )


def fields(attributes: hf_config.Attributes) -> dict[str, Any]:
  """Returns the config's fields, but for the MLP's, with experts or without."""
  bias = attributes.flag('attention_bias', False)
  divisor = attributes.take('logits_scaling', 1.0)
  if type(divisor) not in (int, float) or divisor <= 0:
    raise attributes.refuse('logits_scaling', divisor, 'must be a number > 0')
  return dict(
    qkv_bias=bias,
    o_bias=bias,
    embed_scale=attributes.take('embedding_multiplier', 1.0),
    attention_scale=attributes.take('attention_multiplier', 1.0),
    residual_scale=attributes.take('residual_multiplier', 1.0),
    logit_scale=1 / divisor,
    **hf_config.common(
      attributes, kv_heads=None, theta=10000.0, eps=1e-6, positions=2048
    ),
  )
