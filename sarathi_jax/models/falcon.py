# SPDX-License-Identifier: Apache-2.0
"""Falcon (https://arxiv.org/abs/2311.16867), with rotary embeddings."""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Float

from sarathi_jax.models import attention
from sarathi_jax.models import config as config_lib
from sarathi_jax.models import layers

norm = layers.layer_norm


def norm_specs(config: config_lib.FalconConfig) -> dict[str, Any]:
  """Returns the specs of `norm`'s parameters."""
  return layers.layer_norm_specs(config.hidden_size)


def layer_specs(config: config_lib.FalconConfig, layer: int) -> dict[str, Any]:
  """Returns the specs of one `block`; 'mlp_norm' only with two norms."""
  size = config.layer_mlp(layer).size
  specs = {
    'attn_norm': norm_specs(config),
    'attn': attention.attention_specs(
      config, qkv_bias=config.bias, o_bias=config.bias
    ),
    'mlp': layers.mlp_specs(config, size, gated=False, bias=config.bias),
  }
  if config.num_norms == 2:
    specs['mlp_norm'] = norm_specs(config)
  return specs


def block(
  config: config_lib.FalconConfig,
  params: layers.Params,
  layer_kv: attention.LayerKv,
  x: Float[Array, 'T D'],
  context: attention.LayerContext,
) -> tuple[Float[Array, 'rows D'], attention.LayerKv]:
  """Computes attention and the MLP, side by side or one after the other."""
  shards = context.shards
  normed = norm(params['attn_norm'], x, config.norm_eps)
  out, layer_kv = attention.attention(
    config, params['attn'], layer_kv, normed, context
  )
  x, normed = (context.take(both) for both in (x, normed))
  if config.parallel:
    mlp_input = x
  else:
    out = shards.sum(out)
    mlp_input = x + out
  if config.num_norms == 2:
    normed = norm(params['mlp_norm'], mlp_input, config.norm_eps)
  mlp = layers.plain_mlp(params['mlp'], normed, config.activation, shards)
  if config.parallel:  # One sum for both halves the traffic.
    return x + shards.sum(mlp + out), layer_kv
  return x + (shards.sum(mlp) + out), layer_kv
