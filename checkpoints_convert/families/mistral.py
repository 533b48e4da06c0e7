# SPDX-License-Identifier: Apache-2.0
"""Mistral v0.1 (with a sliding window) to v0.3: Llama's tensors."""

from __future__ import annotations

from checkpoints_convert import hf_config
from checkpoints_convert.families import llama
from sarathi_jax.models import config as config_lib

rules = llama.rules


def read_config(attributes: hf_config.Attributes) -> config_lib.LlamaConfig:
  """Reads what transformers' MistralConfig reads, with its defaults."""
  return config_lib.LlamaConfig(
    sliding_window=attributes.take_or_none('sliding_window', 4096),
    **hf_config.common(
      attributes, kv_heads=8, theta=10000.0, eps=1e-6, positions=131072
    ),
  )
