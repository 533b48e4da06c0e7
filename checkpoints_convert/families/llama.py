# SPDX-License-Identifier: Apache-2.0
"""Llama 2 and 3, and Yi, which is published as Llama."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from checkpoints_convert import hf_config
from checkpoints_convert import rules as rules_lib
from sarathi_jax.models import config as config_lib

_LAYER = 'model.layers.{layer}'

TOP_RULES: tuple[rules_lib.Rule, ...] = (
  rules_lib.Rule('model.embed_tokens.weight', 'embed'),
  rules_lib.Rule('model.norm.weight', 'final_norm.scale'),
  rules_lib.Rule('lm_head.weight', 'lm_head', transpose=True),
  # Written by old versions of transformers; config.json says the same.
  rules_lib.Rule(f'{_LAYER}.self_attn.rotary_emb.inv_freq', None),
)


def norms(leaves: Mapping[str, str]) -> tuple[rules_lib.Rule, ...]:
  """Returns rules of a layer's norms, by the names of modules and leaves."""
  return tuple(
    rules_lib.Rule(
      f'{_LAYER}.{name}.weight', 'layers.{layer}.' + leaf + '.scale'
    )
    for name, leaf in leaves.items()
  )


NORM_RULES = norms(
  {'input_layernorm': 'attn_norm', 'post_attention_layernorm': 'mlp_norm'}
)

ATTENTION_RULES: tuple[rules_lib.Rule, ...] = sum(
  (
    rules_lib.linear(
      f'{_LAYER}.self_attn.{name}_proj', 'layers.{layer}.attn.' + name
    )
    for name in 'qkvo'
  ),
  (),
)


def mlp_rules(module: str, leaf: str) -> tuple[rules_lib.Rule, ...]:
  """Returns rules of a gated MLP, by its module in a layer and its leaf."""
  return sum(
    (
      rules_lib.linear(
        f'{_LAYER}.{module}.{name}_proj', 'layers.{layer}.' + f'{leaf}.{name}'
      )
      for name in ('gate', 'up', 'down')
    ),
    (),
  )


MLP_RULES = mlp_rules('mlp', 'mlp')


def read_config(attributes: hf_config.Attributes) -> config_lib.LlamaConfig:
  """Reads what transformers' LlamaConfig reads, with its defaults."""
  bias = attributes.flag('attention_bias', False)
  return config_lib.LlamaConfig(
    qkv_bias=bias,
    o_bias=bias,
    mlp_bias=attributes.flag('mlp_bias', False),
    **hf_config.common(
      attributes, kv_heads=None, theta=10000.0, eps=1e-6, positions=2048
    ),
  )


def rules(config: config_lib.LlamaConfig) -> tuple[Any, ...]:
  """Returns the `rules.Rule` of each tensor: the same for every config."""
  del config
  return TOP_RULES + NORM_RULES + ATTENTION_RULES + MLP_RULES
