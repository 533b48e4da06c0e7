# SPDX-License-Identifier: Apache-2.0
"""Mixtral (https://arxiv.org/abs/2401.04088) and other mixtures of experts.

Qwen2-MoE, Qwen3-MoE, gpt-oss, Granite, GLM-4.5.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Array

from sarathi_jax.models import attention
from sarathi_jax.models import config as config_lib
from sarathi_jax.models import layers
from sarathi_jax.models import llama
from sarathi_jax.models import moe

norm, norm_specs = llama.norm, llama.norm_specs


def layer_specs(config: config_lib.MixtralConfig, layer: int) -> dict[str, Any]:
  """Returns the specs of one `block`'s parameters."""
  if not config.has_experts(layer):
    return llama.layer_specs(config, layer)
  return llama.around_specs(config) | {'moe': moe.moe_specs(config)}


def block(
  config: config_lib.MixtralConfig,
  params: layers.Params,
  layer_kv: attention.LayerKv,
  x: layers.Stream,
  context: attention.LayerContext,
) -> tuple[layers.Stream, attention.LayerKv]:
  """Adds attention, then the experts' output, to the residual stream.

  A layer without experts is Llama's.
  """
  if 'moe' not in params:
    return llama.block(config, params, layer_kv, x, context)

  def mlp(x: Array) -> Array:
    return moe.moe(config, params['moe'], x, context.is_token, context.shards)

  return llama.block_around(config, params, layer_kv, x, context, mlp)
