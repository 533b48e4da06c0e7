# SPDX-License-Identifier: Apache-2.0
"""Mistral Small 3.1 and later, and Ministral-3, that take images, too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from checkpoints_convert import hf_config
from checkpoints_convert.families import llama
from checkpoints_convert.families import ministral3
from checkpoints_convert.families import mistral
from sarathi_jax.models import config as config_lib

rules = llama.rules

# The text part's model type -> what reads it.
_TEXTS: Mapping[str, Any] = {'ministral3': ministral3, 'mistral': mistral}


def read_config(attributes: hf_config.Attributes) -> config_lib.LlamaConfig:
  """Reads what transformers reads of the text part."""
  kind = attributes.take('model_type', 'mistral')
  if kind not in _TEXTS:
    raise attributes.refuse(
      'text_config.model_type', kind, f'must be one of {", ".join(_TEXTS)}'
    )
  config: config_lib.LlamaConfig = _TEXTS[kind].read_config(attributes)
  return config
