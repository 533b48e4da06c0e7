# SPDX-License-Identifier: Apache-2.0
"""Mixtral (https://arxiv.org/abs/2401.04088)."""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Float

from sarathi_jax.models import attention
from sarathi_jax.models import config as config_lib
from sarathi_jax.models import layers
from sarathi_jax.models import moe

norm = layers.rms_norm


def norm_specs(config: config_lib.MixtralConfig) -> dict[str, Any]:
  """Returns the specs of `norm`'s parameters."""
  return layers.rms_norm_specs(config.hidden_size)


def layer_specs(config: config_lib.MixtralConfig) -> dict[str, Any]:
  """Returns the specs of one `block`'s parameters."""
  return {
    'attn_norm': norm_specs(config),
    'attn': attention.attention_specs(config),
    'mlp_norm': norm_specs(config),
    'moe': moe.moe_specs(config),
  }


def block(
  config: config_lib.MixtralConfig,
  params: layers.Params,
  layer_kv: attention.LayerKv,
  x: Float[Array, 'T D'],
  context: attention.LayerContext,
) -> tuple[Float[Array, 'rows D'], attention.LayerKv]:
  """Adds attention, then the experts' output, to the residual stream."""
  x, layer_kv = attention.add_attention(
    config, params, layer_kv, x, context, norm=norm
  )
  normed = norm(params['mlp_norm'], x, config.norm_eps)
  out = moe.moe(config, params['moe'], normed, context.is_token)
  return x + context.shards.sum(out), layer_kv
