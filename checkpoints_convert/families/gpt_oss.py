# SPDX-License-Identifier: Apache-2.0
"""gpt-oss: sinks, windows on every other layer, and experts of a kind.

Published with experts in MXFP4, which stay so, or are read as bfloat16;
transformers and others also write them as such.
"""

from __future__ import annotations

from typing import Any

from checkpoints_convert import hf_config
from checkpoints_convert import mxfp4
from checkpoints_convert import rules as rules_lib
from checkpoints_convert import transforms
from checkpoints_convert.families import llama
from sarathi_jax.models import config as config_lib

_MLP = 'model.layers.{layer}.mlp'
_LEAF = 'layers.{layer}.moe'
_GATE_UP = {'gate': 0, 'up': 1}  # side by side, number by number

_ROUTER_RULES = rules_lib.linear(f'{_MLP}.router', f'{_LEAF}.router')

# A matrix [experts, in, out], and its bias [experts, out].
_EXPERT_RULES = (
  *(
    rule
    for name, which in _GATE_UP.items()
    for rule in (
      rules_lib.Rule(
        f'{_MLP}.experts.gate_up_proj',
        f'{_LEAF}.{name}',
        column=(which, 2),
        is_stack=True,
      ),
      rules_lib.Rule(
        f'{_MLP}.experts.gate_up_proj_bias',
        f'{_LEAF}.{name}_bias',
        column=(which, 2),
      ),
    )
  ),
  rules_lib.Rule(f'{_MLP}.experts.down_proj', f'{_LEAF}.down', is_stack=True),
  rules_lib.Rule(f'{_MLP}.experts.down_proj_bias', f'{_LEAF}.down_bias'),
)

# In MXFP4, they are [experts, out, in].
_PACKED_RULES = (
  *(
    rules_lib.Rule(
      f'{_MLP}.experts.gate_up_proj{mxfp4.BLOCKS}',
      f'{_LEAF}.{name}',
      transpose=True,
      select=transforms.Select(2, which, 1),
      is_stack=True,
    )
    for name, which in _GATE_UP.items()
  ),
  rules_lib.Rule(
    f'{_MLP}.experts.down_proj{mxfp4.BLOCKS}',
    f'{_LEAF}.down',
    transpose=True,
    is_stack=True,
  ),
)


def read_config(attributes: hf_config.Attributes) -> config_lib.MixtralConfig:
  """Reads what transformers' GptOssConfig reads, with its defaults."""
  _check_packing(attributes)
  fields = hf_config.common(
    attributes,
    kv_heads=8,
    theta=150000.0,
    eps=1e-5,
    positions=131072,
    rope_options=dict(
      absent=dict(
        rope_type='yarn',
        factor=32.0,
        beta_fast=32.0,
        beta_slow=1.0,
        truncate=False,
        original_max_position_embeddings=4096,
      )
    ),
    vocab_size=201088,
    hidden_size=2880,
    intermediate_size=2880,
    num_hidden_layers=36,
    num_attention_heads=64,
    head_dim=64,
  )
  if fields['activation'] != 'silu':  # Of which it is a kind.
    raise attributes.refuse(
      'hidden_act', fields['activation'], 'must be silu in this family'
    )
  attributes.only(swiglu_alpha=1.702)
  chosen = attributes.take('num_experts_per_tok', 4)
  # What OpenAI's own code calls two of these.
  for name, known in (
    ('experts_per_token', chosen),
    ('initial_context_length', fields['rope'].original_max_position),
  ):
    if (value := attributes.take(name, known)) != known:
      raise attributes.refuse(name, value, f'must be {known}, as elsewhere')
  bias = attributes.flag('attention_bias', True)
  return config_lib.MixtralConfig(
    num_experts=attributes.take('num_local_experts', 128),
    experts_per_token=chosen,
    router=config_lib.RouterConfig(bias=True),
    attention_sinks=True,
    qkv_bias=bias,
    o_bias=bias,
    mlp_bias=True,
    gate_limit=attributes.take('swiglu_limit', 7.0),
    **hf_config.with_windows(
      attributes,
      fields | dict(activation='quick_gelu'),
      attributes.take('sliding_window', 128),
      lambda i: i % 2 == 0,
    ),
  )


def _check_packing(attributes: hf_config.Attributes) -> None:
  """Takes what says that experts are in MXFP4; their tensors say so, too."""
  packing = attributes.take('quantization_config', {})
  # Which matrices are as they are, their names tell.
  known = {'quant_method', 'modules_to_not_convert', 'dequantize'}
  if packing and (
    packing.get('quant_method') != 'mxfp4' or packing.keys() - known
  ):
    raise attributes.refuse(
      'quantization_config', packing, "only quant_method='mxfp4' is supported"
    )


def rules(config: config_lib.MixtralConfig) -> tuple[Any, ...]:
  """Returns the `rules.Rule` of each tensor."""
  del config
  return (
    *llama.TOP_RULES,
    *llama.NORM_RULES,
    *llama.ATTENTION_RULES,
    rules_lib.Rule(
      'model.layers.{layer}.self_attn.sinks', 'layers.{layer}.attn.sinks'
    ),
    *_ROUTER_RULES,
    *_EXPERT_RULES,
    *_PACKED_RULES,
  )
