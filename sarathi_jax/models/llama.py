# SPDX-License-Identifier: Apache-2.0
"""Llama, Mistral, Yi, Qwen2 and Qwen3."""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Float

from sarathi_jax.models import attention
from sarathi_jax.models import config as config_lib
from sarathi_jax.models import layers

norm = layers.rms_norm
norm_specs = layers.rms_norm_specs


def layer_specs(config: config_lib.LlamaConfig) -> dict[str, Any]:
  """Returns the specs of one `block`'s parameters."""
  return {
    'attn_norm': norm_specs(config.hidden_size),
    'attn': attention.attention_specs(
      config,
      qkv_bias=config.qkv_bias,
      o_bias=config.o_bias,
      qk_norm=config.qk_norm,
    ),
    'mlp_norm': norm_specs(config.hidden_size),
    'mlp': layers.mlp_specs(config, gated=True, bias=config.mlp_bias),
  }


def block(
  config: config_lib.LlamaConfig,
  params: layers.Params,
  layer_kv: attention.LayerKv,
  x: Float[Array, 'T D'],
  context: attention.LayerContext,
) -> tuple[Float[Array, 'rows D'], attention.LayerKv]:
  """Adds attention, then the MLP, to the residual stream."""
  x, layer_kv = attention.add_attention(
    config, params, layer_kv, x, context, norm=norm
  )
  normed = norm(params['mlp_norm'], x, config.norm_eps)
  out = layers.gated_mlp(
    params['mlp'], normed, config.activation, context.shards
  )
  return x + context.shards.sum(out), layer_kv
