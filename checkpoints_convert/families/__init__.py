# SPDX-License-Identifier: Apache-2.0
"""One module a family: how its config reads, and where its tensors go.

A module has `read_config(attributes) -> ModelConfig`, which takes what it
understands of config.json, and `rules(config) -> tuple[Rule, ...]`.
"""

from __future__ import annotations

from collections.abc import Mapping
import importlib
from typing import Any, NamedTuple

from sarathi_jax import errors


class Family(NamedTuple):
  """What one architecture is read by.

  Attributes:
    model_type: as config.json names it, and the module that reads it.
    models: those that are published, in words.
    is_nested: whether it takes images, too; see `nested`.
    extra_layers: names of the attribute that says how many layers are behind
      the last one, which predict tokens further on, and are left out.
  """

  model_type: str
  models: str
  is_nested: bool = False
  extra_layers: tuple[str, ...] = ()


# The architecture that config.json names -> what reads it.
ARCHITECTURES: Mapping[str, Family] = {
  'FalconForCausalLM': Family('falcon', 'Falcon 7B, 11B, 40B, 180B'),
  'Gemma2ForCausalLM': Family('gemma2', 'Gemma-2'),
  'Gemma3ForCausalLM': Family('gemma3_text', 'Gemma-3 270M, 1B'),
  'Gemma3ForConditionalGeneration': Family(
    'gemma3', 'Gemma-3 4B, 12B, 27B; without images', is_nested=True
  ),
  'Glm4ForCausalLM': Family('glm4', 'GLM-4-0414 9B and 32B, GLM-Z1'),
  'Glm4MoeForCausalLM': Family(
    'glm4_moe',
    'GLM-4.5, GLM-4.5-Air, GLM-4.6; without layers that predict further tokens',
    extra_layers=('num_nextn_predict_layers', 'num_mtp_layers'),
  ),
  'GlmForCausalLM': Family('glm', 'GLM-4-9B of 2024, GLM-Edge'),
  'GptOssForCausalLM': Family(
    'gpt_oss',
    'gpt-oss 20B, 120B; experts stay in MXFP4, or are read as bfloat16 '
    '(`--nokeep_mxfp4`)',
  ),
  'GraniteForCausalLM': Family('granite', 'Granite 3, dense'),
  'GraniteMoeForCausalLM': Family('granitemoe', 'Granite 3 1B-A400M, 3B-A800M'),
  'LlamaForCausalLM': Family('llama', 'Llama 2, 3, 3.1, 3.2, 3.3; Yi'),
  'Ministral3ForCausalLM': Family('ministral3', 'Ministral-3'),
  'MinistralForCausalLM': Family('ministral', 'Ministral 8B of 2024'),
  'Mistral3ForConditionalGeneration': Family(
    'mistral3',
    'Mistral Small 3.1, 3.2, Magistral, Devstral, Ministral-3; without images',
    is_nested=True,
  ),
  'MistralForCausalLM': Family('mistral', 'Mistral 7B, Nemo, Small 3'),
  'MixtralForCausalLM': Family('mixtral', 'Mixtral'),
  'Olmo2ForCausalLM': Family('olmo2', 'OLMo-2'),
  'Olmo3ForCausalLM': Family('olmo3', 'OLMo-3'),
  'Phi3ForCausalLM': Family(
    'phi3', 'Phi-3 mini and medium, Phi-3.5-mini, Phi-4, Phi-4-mini'
  ),
  'Qwen2ForCausalLM': Family('qwen2', 'Qwen2, Qwen2.5'),
  'Qwen2MoeForCausalLM': Family(
    'qwen2_moe', 'Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B'
  ),
  'Qwen3ForCausalLM': Family('qwen3', 'Qwen3'),
  'Qwen3MoeForCausalLM': Family(
    'qwen3_moe', 'Qwen3 30B-A3B, 235B-A22B; Qwen3-Coder'
  ),
  'SmolLM3ForCausalLM': Family('smollm3', 'SmolLM3'),
}

# What those have that is not here, of which it is often asked.
_LATENT = 'attends through latent vectors (MLA)'
_LINEAR = 'has layers of linear attention (gated delta nets)'
_WITHOUT: Mapping[str, str] = {
  **dict.fromkeys(
    (f'DeepseekV{version}ForCausalLM' for version in ('2', '3', '32', '4')),
    _LATENT,
  ),
  **dict.fromkeys(
    (
      'Qwen3NextForCausalLM',
      *(
        f'Qwen3_5{size}For{use}'
        for size in ('', 'Moe')
        for use in ('CausalLM', 'ConditionalGeneration')
      ),
    ),
    _LINEAR,
  ),
}


def architecture_of(model_type: object) -> str | None:
  """Returns the architecture of a model type ('llama'); None if unknown."""
  return next(
    (
      name
      for name, family in ARCHITECTURES.items()
      if family.model_type == model_type
    ),
    None,
  )


def find(architecture: str) -> Any:
  """Returns the module that reads an architecture.

  Raises:
    CheckpointError: no module reads it.
  """
  if architecture not in ARCHITECTURES:
    why = (
      f', as it {_WITHOUT[architecture]}' if architecture in _WITHOUT else ''
    )
    raise errors.CheckpointError(
      f'architecture {architecture!r} is not supported{why}; supported: '
      f'{", ".join(ARCHITECTURES)}.'
    )
  return importlib.import_module(
    f'{__name__}.{ARCHITECTURES[architecture].model_type}'
  )
