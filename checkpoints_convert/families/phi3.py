# SPDX-License-Identifier: Apache-2.0
"""Phi-3, 3.5 and 4: Llama with fused matrices, and LongRoPE."""

from __future__ import annotations

import functools
from typing import Any

from checkpoints_convert import hf_config
from checkpoints_convert import hf_rope
from checkpoints_convert import rules as rules_lib
from checkpoints_convert import transforms
from checkpoints_convert.families import llama
from sarathi_jax.models import config as config_lib

_LAYER = 'model.layers.{layer}'
_LEAF = 'layers.{layer}'


def read_config(attributes: hf_config.Attributes) -> config_lib.LlamaConfig:
  """Reads what transformers' Phi3Config reads, with its defaults."""
  longrope = functools.partial(
    hf_rope.longrope,
    original=attributes.size('original_max_position_embeddings', 4096),
  )
  # Of Phi-4-mini's own code; transformers' has none of it.
  attributes.only(
    attention_bias=False,
    full_attn_mod=1,
    interpolate_factor=1,
    lm_head_bias=False,
    mlp_bias=False,
  )
  for name in ('embd_pdrop', 'resid_pdrop'):  # of training
    attributes.take(name)
  fields = hf_config.common(
    attributes,
    kv_heads=None,
    theta=10000.0,
    eps=1e-5,
    positions=4096,
    rope_options=dict(
      partial=1.0,
      kinds={
        'default': hf_rope.default,
        # Two of these are older names.
        **dict.fromkeys(('longrope', 'su', 'yarn'), longrope),
      },
    ),
  )
  window = attributes.take('sliding_window')
  if type(window) is int and window >= fields['max_position_embeddings']:
    window = None  # No token is as far away.
  return config_lib.LlamaConfig(sliding_window=window, **fields)


def fused(tensor: str, leaf: str, **sizes: int) -> tuple[rules_lib.Rule, ...]:
  """Returns the rules of matrices that lie below one another in one tensor.

  Args:
    tensor: the linear layer's name.
    leaf: the path that the parameters' names are appended to.
    **sizes: the rows of each, by its name, in order.
  """
  rules: list[rules_lib.Rule] = []
  stride, offset = sum(sizes.values()), 0
  for name, size in sizes.items():
    select = transforms.Select(stride, offset, size)
    rules += rules_lib.linear(tensor, f'{leaf}.{name}', select)
    offset += size
  return tuple(rules)


def mlp_rules(config: config_lib.LlamaConfig) -> tuple[rules_lib.Rule, ...]:
  """Returns the rules of an MLP whose gate and up are in one tensor."""
  return (
    *fused(
      f'{_LAYER}.mlp.gate_up_proj',
      f'{_LEAF}.mlp',
      gate=config.intermediate_size,
      up=config.intermediate_size,
    ),
    *rules_lib.linear(f'{_LAYER}.mlp.down_proj', f'{_LEAF}.mlp.down'),
  )


def rules(config: config_lib.LlamaConfig) -> tuple[Any, ...]:
  """Returns the `rules.Rule` of each tensor; sizes say what is fused."""
  kv_size = config.num_kv_heads * config.head_dim
  return (
    llama.TOP_RULES
    + llama.NORM_RULES
    + fused(
      f'{_LAYER}.self_attn.qkv_proj',
      f'{_LEAF}.attn',
      q=config.num_heads * config.head_dim,
      k=kv_size,
      v=kv_size,
    )
    + rules_lib.linear(f'{_LAYER}.self_attn.o_proj', f'{_LEAF}.attn.o')
    + mlp_rules(config)
  )
