# SPDX-License-Identifier: Apache-2.0
"""Qwen3-MoE: Qwen3's attention, and experts."""

from __future__ import annotations

from typing import Any

from checkpoints_convert import hf_config
from checkpoints_convert import rules as rules_lib
from checkpoints_convert.families import llama
from checkpoints_convert.families import qwen3
from sarathi_jax.models import config as config_lib

_MOE = 'model.layers.{layer}.mlp'
_LEAF = 'layers.{layer}.moe'

MOE_RULES = (
  rules_lib.Rule(f'{_MOE}.gate.weight', f'{_LEAF}.router', transpose=True),
  *(
    rules_lib.Rule(
      f'{_MOE}.experts.{{expert}}.{name}_proj.weight',
      f'{_LEAF}.{name}',
      transpose=True,
    )
    for name in ('gate', 'up', 'down')
  ),
)


def read_config(attributes: hf_config.Attributes) -> config_lib.MixtralConfig:
  """Reads what transformers' Qwen3MoeConfig reads, with its defaults."""
  bias = attributes.flag('attention_bias', False)
  return config_lib.MixtralConfig(
    qk_norm=True,
    qkv_bias=bias,
    o_bias=bias,
    **fields(
      attributes, kv_heads=4, num_experts=128, experts_per_token=8, size=768
    ),
  )


def fields(
  attributes: hf_config.Attributes,
  *,
  kv_heads: int,
  num_experts: int,
  experts_per_token: int,
  size: int,
) -> dict[str, Any]:
  """Returns the config's fields, but for attention's, of Qwen2-MoE or Qwen3's.

  Args:
    attributes: to take from.
    kv_heads, num_experts, experts_per_token, size: defaults; the last one is of
      moe_intermediate_size.
  """
  common = hf_config.common(
    attributes,
    kv_heads=kv_heads,
    theta=10000.0,
    eps=1e-6,
    positions=32768,
    intermediate_size=1,  # Unless there are dense layers.
  )
  for name in ('sliding_window', 'max_window_layers'):  # There is no window.
    attributes.take(name)
  if attributes.flag('use_sliding_window', False):
    raise attributes.refuse(
      'use_sliding_window',
      True,
      'must be false: versions of transformers differ in which layers have it',
    )
  dense = _dense_layers(attributes, common['num_layers'])
  # transformers 5 writes another name than the hub has.
  known = attributes.take('num_local_experts')
  same = attributes.take('num_experts', known)
  if known not in (None, same):
    raise attributes.refuse(
      'num_experts', same, f'must be num_local_experts={known}'
    )
  return common | dict(
    num_experts=num_experts if same is None else same,
    experts_per_token=attributes.take('num_experts_per_tok', experts_per_token),
    router=config_lib.RouterConfig(
      sums_to_one=attributes.flag('norm_topk_prob', False)
    ),
    dense_layers=None if dense == tuple(range(len(dense))) else dense,
    dense_sizes=(common['intermediate_size'],) * len(dense),
    intermediate_size=attributes.take('moe_intermediate_size', size),
  )


def _dense_layers(
  attributes: hf_config.Attributes, num_layers: int
) -> tuple[int, ...]:
  """Takes which layers have no experts."""
  step = attributes.size('decoder_sparse_step', 1)
  listed = attributes.take('mlp_only_layers', [])
  if not isinstance(listed, list) or not all(
    type(i) is int and 0 <= i < num_layers for i in listed
  ):
    raise attributes.refuse(
      'mlp_only_layers', listed, f'must be layers in [0, {num_layers})'
    )
  return tuple(
    i for i in range(num_layers) if i in listed or (i + 1) % step != 0
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
    *MOE_RULES,
  )
