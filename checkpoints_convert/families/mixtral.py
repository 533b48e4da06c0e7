# SPDX-License-Identifier: Apache-2.0
"""Mixtral: Mistral's attention, and experts."""

from __future__ import annotations

from typing import Any

from checkpoints_convert import hf_config
from checkpoints_convert import rules as rules_lib
from checkpoints_convert.families import llama
from sarathi_jax.models import config as config_lib

_MOE = 'model.layers.{layer}.block_sparse_moe'
_LEAF = 'layers.{layer}.moe'

_MOE_RULES = (
  rules_lib.Rule(f'{_MOE}.gate.weight', f'{_LEAF}.router', transpose=True),
  *(
    rules_lib.Rule(
      f'{_MOE}.experts.{{expert}}.{name}.weight',
      f'{_LEAF}.{leaf}',
      transpose=True,
    )
    for name, leaf in (('w1', 'gate'), ('w2', 'down'), ('w3', 'up'))
  ),
)


def read_config(attributes: hf_config.Attributes) -> config_lib.MixtralConfig:
  """Reads what transformers' MixtralConfig reads, with its defaults."""
  return config_lib.MixtralConfig(
    num_experts=attributes.take('num_local_experts', 8),
    experts_per_token=attributes.take('num_experts_per_tok', 2),
    sliding_window=attributes.take('sliding_window'),
    **hf_config.common(
      attributes, kv_heads=8, theta=1e6, eps=1e-5, positions=131072
    ),
  )


def rules(config: config_lib.MixtralConfig) -> tuple[Any, ...]:
  """Returns the `rules.Rule` of each tensor."""
  del config
  return llama.TOP_RULES + llama.NORM_RULES + llama.ATTENTION_RULES + _MOE_RULES
