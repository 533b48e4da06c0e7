# SPDX-License-Identifier: Apache-2.0
"""One module a family: how its config reads, and where its tensors go.

A module has `read_config(attributes) -> ModelConfig`, which takes what it
understands of config.json, and `rules(config) -> tuple[Rule, ...]`.
"""

from __future__ import annotations

from collections.abc import Mapping
import importlib
from typing import Any

from sarathi_jax import errors

_HERE = 'checkpoints_convert.families'

# The architecture that config.json names -> the module that reads it.
ARCHITECTURES: Mapping[str, str] = {
  'FalconForCausalLM': f'{_HERE}.falcon',
  'LlamaForCausalLM': f'{_HERE}.llama',
  'MistralForCausalLM': f'{_HERE}.mistral',
  'MixtralForCausalLM': f'{_HERE}.mixtral',
  'Qwen2ForCausalLM': f'{_HERE}.qwen2',
  'Qwen3ForCausalLM': f'{_HERE}.qwen3',
}


def architecture_of(model_type: object) -> str | None:
  """Returns the architecture of a model type ('llama'); None if unknown."""
  return next(
    (
      name
      for name, module in ARCHITECTURES.items()
      if module == f'{_HERE}.{model_type}'
    ),
    None,
  )


def find(architecture: str) -> Any:
  """Returns the module that reads an architecture.

  Raises:
    CheckpointError: no module reads it.
  """
  if architecture not in ARCHITECTURES:
    raise errors.CheckpointError(
      f'architecture {architecture!r} is not supported; supported: '
      f'{", ".join(ARCHITECTURES)}.'
    )
  return importlib.import_module(ARCHITECTURES[architecture])
