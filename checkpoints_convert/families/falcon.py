# SPDX-License-Identifier: Apache-2.0
"""Falcon 7B, 11B, 40B and 180B, which keep q, k and v in one tensor.

Its rows are in groups, one a key and value head: the queries that read it, the
key, the value. Multi-query models have one group. With alibi there is no
rotary embedding, and nothing here for it.
"""

from __future__ import annotations

from typing import Any

from checkpoints_convert import hf_config
from checkpoints_convert import hf_rope
from checkpoints_convert import rules as rules_lib
from checkpoints_convert import transforms
from sarathi_jax.models import config as config_lib
from sarathi_jax.models import fields as fields_lib

_LAYER = 'transformer.h.{layer}'
_LEAF = 'layers.{layer}'


def read_config(attributes: hf_config.Attributes) -> config_lib.FalconConfig:
  """Reads what transformers' FalconConfig reads, with its defaults."""
  if attributes.flag('alibi', False):
    raise attributes.refuse(
      'alibi', True, 'only Falcon models with rotary embeddings are supported'
    )
  hidden_size = attributes.size('hidden_size')
  num_heads = attributes.size('num_attention_heads')
  parallel, num_norms, num_kv_heads = _variant(attributes, num_heads)
  return config_lib.FalconConfig(
    vocab_size=attributes.require('vocab_size'),
    hidden_size=hidden_size,
    intermediate_size=attributes.take('ffn_hidden_size', 4 * hidden_size),
    num_layers=attributes.size(
      'num_hidden_layers', most=fields_lib.MOST_LAYERS
    ),
    num_heads=num_heads,
    num_kv_heads=num_kv_heads,
    head_dim=hidden_size // num_heads,
    norm_eps=attributes.take('layer_norm_epsilon', 1e-5),
    activation=hf_config.activation(attributes, 'activation', 'gelu'),
    tie_word_embeddings=attributes.flag('tie_word_embeddings', True),
    parallel=parallel,
    num_norms=num_norms,
    bias=attributes.flag('bias', False),
    **hf_rope.read(
      attributes, 10000.0, attributes.size('max_position_embeddings', 2048)
    ),
  )


def _variant(
  attributes: hf_config.Attributes, num_heads: int
) -> tuple[bool, int, int]:
  """Returns (parallel, num_norms, num_kv_heads).

  The new decoder architecture may have two norms side by side. The old one has
  one norm, or its attention and MLP follow one another.
  """
  new = attributes.flag('new_decoder_architecture', False)
  parallel = attributes.flag('parallel_attn', True)
  multi_query = attributes.flag('multi_query', True)
  kv_heads = attributes.take('num_kv_heads', num_heads)
  norms = attributes.take('num_ln_in_parallel_attn', 2 if new else 1)
  if new and not parallel:
    raise attributes.refuse(
      'parallel_attn', parallel, 'must be true in the new architecture'
    )
  if not new and parallel and norms != 1:
    raise attributes.refuse(
      'num_ln_in_parallel_attn', norms, 'must be 1 in the old architecture'
    )
  if not new:
    kv_heads = 1 if multi_query else num_heads
  return parallel, norms if parallel else 2, kv_heads


def rules(config: config_lib.FalconConfig) -> tuple[Any, ...]:
  """Returns the `rules.Rule` of each tensor.

  The numbers of heads determine how q, k and v are fused.
  """
  width = config.head_dim
  group = config.num_heads // config.num_kv_heads
  stride = (group + 2) * width
  fused = {
    'q': transforms.Select(stride, 0, group * width),
    'k': transforms.Select(stride, group * width, width),
    'v': transforms.Select(stride, (group + 1) * width, width),
  }
  table = [
    rules_lib.Rule('transformer.word_embeddings.weight', 'embed'),
    rules_lib.Rule('lm_head.weight', 'lm_head', transpose=True),
    rules_lib.Rule(f'{_LAYER}.self_attention.rotary_emb.inv_freq', None),
    rules_lib.Rule(f'{_LAYER}.self_attention.maybe_rotary.inv_freq', None),
  ]
  for name, leaf in (
    ('transformer.ln_f', 'final_norm'),
    (f'{_LAYER}.input_layernorm', f'{_LEAF}.attn_norm'),
    (f'{_LAYER}.post_attention_layernorm', f'{_LEAF}.mlp_norm'),
    (f'{_LAYER}.ln_attn', f'{_LEAF}.attn_norm'),
    (f'{_LAYER}.ln_mlp', f'{_LEAF}.mlp_norm'),
  ):
    table += [
      rules_lib.Rule(f'{name}.weight', f'{leaf}.scale'),
      rules_lib.Rule(f'{name}.bias', f'{leaf}.bias'),
    ]
  for part, select in fused.items():
    table += rules_lib.linear(
      f'{_LAYER}.self_attention.query_key_value', f'{_LEAF}.attn.{part}', select
    )
  for name, leaf in (
    (f'{_LAYER}.self_attention.dense', f'{_LEAF}.attn.o'),
    (f'{_LAYER}.mlp.dense_h_to_4h', f'{_LEAF}.mlp.up'),
    (f'{_LAYER}.mlp.dense_4h_to_h', f'{_LEAF}.mlp.down'),
  ):
    table += rules_lib.linear(name, leaf)
  return tuple(table)
