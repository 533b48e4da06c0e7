# SPDX-License-Identifier: Apache-2.0
"""Qwen1.5-MoE and Qwen2-MoE: Qwen2's attention, experts, and a shared one."""

from __future__ import annotations

from typing import Any

from checkpoints_convert import hf_config
from checkpoints_convert import rules as rules_lib
from checkpoints_convert.families import llama
from checkpoints_convert.families import qwen3_moe
from sarathi_jax.models import config as config_lib

_SHARED_RULES = (
  *llama.mlp_rules('mlp.shared_expert', 'moe.shared'),
  rules_lib.Rule(
    'model.layers.{layer}.mlp.shared_expert_gate.weight',
    'layers.{layer}.moe.shared_gate',
    transpose=True,
  ),
)


def read_config(attributes: hf_config.Attributes) -> config_lib.MixtralConfig:
  """Reads what transformers' Qwen2MoeConfig reads, with its defaults."""
  fields = qwen3_moe.fields(
    attributes, kv_heads=16, num_experts=60, experts_per_token=4, size=1408
  )
  return config_lib.MixtralConfig(
    qkv_bias=attributes.flag('qkv_bias', True),
    shared_size=attributes.size('shared_expert_intermediate_size', 5632),
    shared_gate=True,
    **hf_config.with_windows(attributes, fields, None, lambda i: False),
  )


def rules(config: config_lib.MixtralConfig) -> tuple[Any, ...]:
  """Returns the `rules.Rule` of each tensor."""
  del config
  return (
    *llama.TOP_RULES,
    *llama.NORM_RULES,
    *llama.ATTENTION_RULES,
    *llama.MLP_RULES,
    *qwen3_moe.MOE_RULES,
    *_SHARED_RULES,
  )
