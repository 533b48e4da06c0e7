# SPDX-License-Identifier: Apache-2.0
"""Qwen2 and Qwen2.5: Llama with biases on q, k and v."""

from __future__ import annotations

from typing import Any

from checkpoints_convert import hf_config
from checkpoints_convert.families import llama
from sarathi_jax.models import config as config_lib

rules = llama.rules


def read_config(attributes: hf_config.Attributes) -> config_lib.LlamaConfig:
  """Reads what transformers' Qwen2Config reads, with its defaults."""
  fields = hf_config.common(
    attributes, kv_heads=32, theta=10000.0, eps=1e-6, positions=32768
  )
  return config_lib.LlamaConfig(
    qkv_bias=True, **with_windows(attributes, fields)
  )


def with_windows(
  attributes: hf_config.Attributes, fields: dict[str, Any]
) -> dict[str, Any]:
  """Returns the config's fields, with those for the sliding window, if any.

  Newer files list `layer_types`. In older ones the layers from
  `max_window_layers` on have the window, if `use_sliding_window` says so.
  """
  window = attributes.take_or_none('sliding_window', 4096)
  first = attributes.take('max_window_layers', 28)
  if not attributes.flag('use_sliding_window', False):
    window = None
  return hf_config.with_windows(
    attributes, fields, window, lambda i: window is not None and i >= first
  )
