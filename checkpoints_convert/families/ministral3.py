# SPDX-License-Identifier: Apache-2.0
"""Ministral-3: Mistral whose queries grow with their position."""

from __future__ import annotations

from typing import Any

from checkpoints_convert import hf_config
from checkpoints_convert import hf_rope
from checkpoints_convert.families import llama
from sarathi_jax.models import config as config_lib

rules = llama.rules

# transformers' own, if config.json has none.
_ROPE = dict(
  rope_type='yarn',
  rope_theta=1e6,
  factor=16.0,
  original_max_position_embeddings=16384,
  beta_fast=32.0,
  beta_slow=1.0,
  mscale=1.0,
  mscale_all_dim=1.0,
  llama_4_scaling_beta=0.1,
)


def read_config(attributes: hf_config.Attributes) -> config_lib.LlamaConfig:
  """Reads what transformers' Ministral3Config reads, with its defaults."""
  told: dict[str, Any] = {}  # By the rotation's numbers.

  def yarn(numbers: dict[str, Any], theta: float, positions: int) -> Any:
    numbers.pop('max_position_embeddings', None)  # As beside the rotation.
    told['query_growth'] = numbers.pop('llama_4_scaling_beta', None)
    return hf_rope.yarn(numbers, theta, positions)

  fields = hf_config.common(
    attributes,
    kv_heads=8,
    theta=10000.0,
    eps=1e-5,
    positions=262144,
    head_dim=128,
    rope_options=dict(kinds={'yarn': yarn}, absent=_ROPE),
  )
  if told['query_growth'] is None:
    raise attributes.error('rope_parameters.llama_4_scaling_beta: missing')
  return config_lib.LlamaConfig(
    sliding_window=attributes.take('sliding_window'), **fields, **told
  )
