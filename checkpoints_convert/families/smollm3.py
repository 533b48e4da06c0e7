# SPDX-License-Identifier: Apache-2.0
"""SmolLM3: Llama, of whose layers every fourth rotates nothing."""

from __future__ import annotations

from typing import Any

from checkpoints_convert import hf_config
from checkpoints_convert.families import llama
from sarathi_jax.models import config as config_lib

rules = llama.rules


def read_config(attributes: hf_config.Attributes) -> config_lib.LlamaConfig:
  """Reads what transformers' SmolLM3Config reads, with its defaults."""
  fields = hf_config.common(
    attributes,
    kv_heads=4,
    theta=2e6,
    eps=1e-6,
    positions=32768,
    tie_word_embeddings=True,
  )
  bias = attributes.flag('attention_bias', False)
  unrotated = _unrotated(attributes, fields['num_layers'])
  window = attributes.take('sliding_window')
  if not attributes.flag('use_sliding_window', False):
    window = None
  attributes.take('max_window_layers')  # Qwen2's; it is not read.
  return config_lib.LlamaConfig(
    qkv_bias=bias,
    o_bias=bias,
    mlp_bias=attributes.flag('mlp_bias', False),
    unrotated_layers=unrotated,
    **hf_config.with_windows(
      attributes,
      fields,
      window,
      lambda i: window is not None and i in unrotated,
    ),
  )


def _unrotated(
  attributes: hf_config.Attributes, num_layers: int
) -> tuple[int, ...]:
  """Returns the layers without rotation, which `no_rope_layers` has as 0."""
  period = attributes.size('no_rope_layer_interval', 4)
  rotated: Any = attributes.take(
    'no_rope_layers', [int((i + 1) % period != 0) for i in range(num_layers)]
  )
  if len(rotated) < num_layers or not {0, 1}.issuperset(rotated):
    raise attributes.refuse(
      'no_rope_layers', rotated, f'must be 0 or 1 for all {num_layers} layers'
    )
  return tuple(i for i in range(num_layers) if not rotated[i])
