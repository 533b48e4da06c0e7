# SPDX-License-Identifier: Apache-2.0
"""Gemma-2: norms on both sides, soft caps, a window in every other layer."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

from checkpoints_convert import hf_config
from checkpoints_convert import rules as rules_lib
from checkpoints_convert.families import llama
from sarathi_jax.models import config as config_lib

_NORMS = llama.norms(
  {
    'input_layernorm': 'attn_norm',
    'post_attention_layernorm': 'attn_out_norm',
    'pre_feedforward_layernorm': 'mlp_norm',
    'post_feedforward_layernorm': 'mlp_out_norm',
  }
)

DEFAULTS: Mapping[str, Any] = dict(
  kv_heads=4,
  eps=1e-6,
  hidden_size=2304,
  intermediate_size=9216,
  num_hidden_layers=26,
  num_attention_heads=8,
  head_dim=256,
  activation_name='hidden_activation',
  hidden_activation='gelu_pytorch_tanh',
  tie_word_embeddings=True,
)


def read_config(attributes: hf_config.Attributes) -> config_lib.LlamaConfig:
  """Reads what transformers' Gemma2Config reads, with its defaults."""
  return config_lib.LlamaConfig(
    attention_soft_cap=attributes.take_or_none('attn_logit_softcapping', 50.0),
    logit_soft_cap=attributes.take_or_none('final_logit_softcapping', 30.0),
    **shared(
      attributes,
      hf_config.common(
        attributes,
        theta=10000.0,
        positions=8192,
        vocab_size=256000,
        **DEFAULTS,
      ),
      period=2,
    ),
  )


def shared(
  attributes: hf_config.Attributes, fields: dict[str, Any], *, period: int
) -> dict[str, Any]:
  """Takes what tells Gemma's layers from Llama's; returns the fields.

  Args:
    attributes: to take from.
    fields: of `hf_config.common`.
    period: one of so many layers has no window, if the file lists no types.
  """
  # Those are written for other programs; transformers reads others.
  for name in ('hidden_act', 'sliding_window_size'):
    attributes.take(name)
  bias = attributes.flag('attention_bias', False)
  window = attributes.take_or_none('sliding_window', 4096)
  return dict(
    norms='around',
    norm_from_one=True,
    qkv_bias=bias,
    o_bias=bias,
    embed_scale=fields['hidden_size'] ** 0.5,
    attention_scale=attributes.size('query_pre_attn_scalar', 256) ** -0.5,
    overflows_float16=True,
    **hf_config.with_windows(
      attributes, fields, window, lambda i: i % period != period - 1
    ),
  )


def from_one(rules: tuple[rules_lib.Rule, ...]) -> tuple[rules_lib.Rule, ...]:
  """Returns rules whose norms are kept as what they add to 1."""
  return tuple(
    dataclasses.replace(rule, leaf=rule.leaf.replace('.scale', '.offset'))
    if rule.leaf
    else rule
    for rule in rules
  )


def rules(config: config_lib.LlamaConfig) -> tuple[Any, ...]:
  """Returns the `rules.Rule` of each tensor: the same for every config."""
  del config
  return from_one(
    llama.TOP_RULES + _NORMS + llama.ATTENTION_RULES + llama.MLP_RULES
  )
