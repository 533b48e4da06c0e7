# SPDX-License-Identifier: Apache-2.0
"""GLM-4 of 2024: pairs side by side are rotated, in half of each head."""

from __future__ import annotations

from typing import Any

from checkpoints_convert import hf_config
from checkpoints_convert import rules as rules_lib
from checkpoints_convert import transforms
from checkpoints_convert.families import llama
from checkpoints_convert.families import phi3
from sarathi_jax.models import config as config_lib

_LAYER = 'model.layers.{layer}'
_LEAF = 'layers.{layer}'


def read_config(attributes: hf_config.Attributes) -> config_lib.LlamaConfig:
  """Reads what transformers' GlmConfig reads, with its defaults."""
  return config_lib.LlamaConfig(**fields(attributes))


def fields(attributes: hf_config.Attributes) -> dict[str, Any]:
  """Returns the config's fields, of GLM-4 of either year."""
  return dict(
    qkv_bias=attributes.flag('attention_bias', True),
    overflows_float16=True,
    **hf_config.common(
      attributes,
      kv_heads=2,
      theta=10000.0,
      eps=1.5625e-07,
      positions=131072,
      head_dim=128,
      rope_options=dict(partial=0.5),
    ),
  )


def attention_rules(
  config: config_lib.LlamaConfig,
) -> tuple[rules_lib.Rule, ...]:
  """Returns the rules of the attention.

  Of each head of q and k, the numbers of a pair are put half a rotation apart,
  as in Llama: q . k is the same.
  """
  width = config.head_dim
  heads = transforms.Select(width, 0, width, config.rope.rotary_dim or width)
  return sum(
    (
      rules_lib.linear(
        f'{_LAYER}.self_attn.{name}_proj', f'{_LEAF}.attn.{name}', select
      )
      for name, select in (('q', heads), ('k', heads), ('v', None), ('o', None))
    ),
    (),
  )


def rules(config: config_lib.LlamaConfig) -> tuple[Any, ...]:
  """Returns the `rules.Rule` of each tensor; sizes say what is fused."""
  return (
    llama.TOP_RULES
    + llama.NORM_RULES
    + attention_rules(config)
    + phi3.mlp_rules(config)
  )
