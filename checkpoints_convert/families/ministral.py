# SPDX-License-Identifier: Apache-2.0
"""Ministral 8B of 2024: Mistral with a window in some layers."""

from __future__ import annotations

from checkpoints_convert import hf_config
from checkpoints_convert.families import llama
from sarathi_jax.models import config as config_lib

rules = llama.rules


def read_config(attributes: hf_config.Attributes) -> config_lib.LlamaConfig:
  """Reads what transformers' MinistralConfig reads, with its defaults."""
  window = attributes.take_or_none('sliding_window', 4096)
  return config_lib.LlamaConfig(
    **hf_config.with_windows(
      attributes,
      hf_config.common(
        attributes, kv_heads=8, theta=10000.0, eps=1e-6, positions=131072
      ),
      window,
      lambda layer: window is not None,
    )
  )
