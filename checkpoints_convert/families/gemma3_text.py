# SPDX-License-Identifier: Apache-2.0
"""Gemma-3's text: Gemma-2 with two rotations, and normalized heads of q and k.

It has no soft cap of attention.
"""

from __future__ import annotations

from typing import Any

from checkpoints_convert import hf_config
from checkpoints_convert import hf_rope
from checkpoints_convert.families import gemma2
from checkpoints_convert.families import qwen3
from sarathi_jax.models import config as config_lib


def read_config(attributes: hf_config.Attributes) -> config_lib.LlamaConfig:
  """Reads what transformers' Gemma3TextConfig reads, with its defaults."""
  if (cap := attributes.take('attn_logit_softcapping')) is not None:
    raise attributes.refuse(
      'attn_logit_softcapping', cap, 'must be null, as Gemma-3 has none'
    )
  attributes.take('_sliding_window_pattern')  # What layer_types were made by.
  fields = gemma2.shared(
    attributes,
    hf_config.common(
      attributes,
      theta={
        hf_rope.FULL: attributes.take('rope_theta', 1e6),
        hf_rope.SLIDING: attributes.take('rope_local_base_freq', 1e4),
      },
      positions=131072,
      vocab_size=262208,
      **gemma2.DEFAULTS,
    ),
    period=attributes.size('sliding_window_pattern', 6),
  )
  return config_lib.LlamaConfig(
    qk_norm=True,
    logit_soft_cap=attributes.take('final_logit_softcapping'),
    **fields,
  )


def rules(config: config_lib.LlamaConfig) -> tuple[Any, ...]:
  """Returns Gemma-2's rules, and those of the norms of q and k."""
  return gemma2.rules(config) + gemma2.from_one(qwen3.NORM_RULES)
