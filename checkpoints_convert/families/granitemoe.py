# SPDX-License-Identifier: Apache-2.0
"""Granite 3 with experts, whose matrices of a kind are in one tensor."""

from __future__ import annotations

from typing import Any

from checkpoints_convert import hf_config
from checkpoints_convert import rules as rules_lib
from checkpoints_convert import transforms
from checkpoints_convert.families import granite
from checkpoints_convert.families import llama
from sarathi_jax.models import config as config_lib

_MOE = 'model.layers.{layer}.block_sparse_moe'
_LEAF = 'layers.{layer}.moe'


def read_config(attributes: hf_config.Attributes) -> config_lib.MixtralConfig:
  """Reads what transformers' GraniteMoeConfig reads, with its defaults."""
  return config_lib.MixtralConfig(
    num_experts=attributes.take('num_local_experts', 8),
    experts_per_token=attributes.take('num_experts_per_tok', 2),
    **granite.fields(attributes),
  )


def rules(config: config_lib.MixtralConfig) -> tuple[Any, ...]:
  """Returns the `rules.Rule` of each tensor; sizes say what is fused."""
  size = config.intermediate_size
  return (
    *llama.TOP_RULES,
    *llama.NORM_RULES,
    *llama.ATTENTION_RULES,
    rules_lib.Rule(
      f'{_MOE}.router.layer.weight', f'{_LEAF}.router', transpose=True
    ),
    *(
      rules_lib.Rule(
        f'{_MOE}.input_linear.weight',
        f'{_LEAF}.{name}',
        transpose=True,
        select=transforms.Select(2 * size, offset, size),
        is_stack=True,
      )
      for name, offset in (('gate', 0), ('up', size))
    ),
    rules_lib.Rule(
      f'{_MOE}.output_linear.weight',
      f'{_LEAF}.down',
      transpose=True,
      is_stack=True,
    ),
  )
