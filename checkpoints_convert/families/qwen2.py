# SPDX-License-Identifier: Apache-2.0
"""Qwen2 and Qwen2.5: Llama with biases on q, k and v."""

from __future__ import annotations

from typing import Any

from checkpoints_convert import hf_config
from checkpoints_convert import hf_rope
from checkpoints_convert.families import llama
from sarathi_jax.models import config as config_lib

rules = llama.rules


def read_config(attributes: hf_config.Attributes) -> config_lib.LlamaConfig:
  """Reads what transformers' Qwen2Config reads, with its defaults."""
  fields = hf_config.common(
    attributes, kv_heads=32, theta=10000.0, eps=1e-6, positions=32768
  )
  return config_lib.LlamaConfig(
    qkv_bias=True, **fields, **windows(attributes, fields['num_layers'])
  )


def windows(
  attributes: hf_config.Attributes, num_layers: int
) -> dict[str, Any]:
  """Returns the config's fields for the sliding window; none without one.

  Newer files list `layer_types`. In older ones the layers from
  `max_window_layers` on have the window, if `use_sliding_window` says so.
  """
  window = attributes.take_or_none('sliding_window', 4096)
  first = attributes.take('max_window_layers', 28)
  if not attributes.flag('use_sliding_window', False):
    window = None
  types = [
    hf_rope.SLIDING if window is not None and i >= first else hf_rope.FULL
    for i in range(num_layers)
  ]
  return hf_config.windows(attributes, num_layers, window, types)
