# SPDX-License-Identifier: Apache-2.0
"""GLM-4.5: half of each head is rotated, and the first layers are dense."""

from __future__ import annotations

from typing import Any

from checkpoints_convert import hf_config
from checkpoints_convert import rules as rules_lib
from checkpoints_convert.families import llama
from checkpoints_convert.families import qwen3
from checkpoints_convert.families import qwen3_moe
from sarathi_jax.models import config as config_lib

_CHOICE_RULE = rules_lib.Rule(
  'model.layers.{layer}.mlp.gate.e_score_correction_bias',
  'layers.{layer}.moe.choice_bias',
)


def read_config(attributes: hf_config.Attributes) -> config_lib.MixtralConfig:
  """Reads what transformers' Glm4MoeConfig reads, with its defaults."""
  fields = hf_config.common(
    attributes,
    kv_heads=8,
    theta=10000.0,
    eps=1e-5,
    positions=131072,
    vocab_size=151552,
    hidden_size=4096,
    intermediate_size=10944,
    num_hidden_layers=46,
    num_attention_heads=96,
    rope_options=dict(partial=0.5),
  )
  size = attributes.size('moe_intermediate_size', 1408)
  num_dense = attributes.take('first_k_dense_replace', 1)
  most = fields['num_layers']
  if type(num_dense) is not int or not 0 <= num_dense < most:
    raise attributes.refuse(
      'first_k_dense_replace', num_dense, f'must be an integer in [0, {most})'
    )
  return config_lib.MixtralConfig(
    num_experts=attributes.take('n_routed_experts', 128),
    experts_per_token=attributes.take('num_experts_per_tok', 8),
    router=config_lib.RouterConfig(
      score='sigmoid',
      choice_bias=True,
      num_groups=attributes.take('n_group', 1),
      top_groups=attributes.take('topk_group', 1),
      sums_to_one=attributes.flag('norm_topk_prob', True),
      scale=attributes.take('routed_scaling_factor', 1.0),
    ),
    shared_size=size * attributes.size('n_shared_experts', 1),
    dense_sizes=(fields['intermediate_size'],) * num_dense,
    qk_norm=attributes.flag('use_qk_norm', False),
    qkv_bias=attributes.flag('attention_bias', False),
    **fields | dict(intermediate_size=size),
  )


def rules(config: config_lib.MixtralConfig) -> tuple[Any, ...]:
  """Returns the `rules.Rule` of each tensor."""
  del config
  return (
    *llama.TOP_RULES,
    *llama.NORM_RULES,
    *llama.ATTENTION_RULES,
    *qwen3.NORM_RULES,
    *llama.MLP_RULES,
    *qwen3_moe.MOE_RULES,
    *llama.mlp_rules('mlp.shared_experts', 'moe.shared'),
    _CHOICE_RULE,
  )
