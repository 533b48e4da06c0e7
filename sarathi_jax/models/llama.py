# SPDX-License-Identifier: Apache-2.0
"""Llama, and what has its layers but for switches.

Mistral, Yi, Qwen, OLMo, Gemma, Phi, SmolLM, Granite, GLM.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxtyping import Array

from sarathi_jax.models import attention
from sarathi_jax.models import config as config_lib
from sarathi_jax.models import layers

norm = layers.rms_norm


def norm_specs(config: config_lib.LlamaConfig) -> dict[str, Any]:
  """Returns the specs of `norm`'s parameters."""
  return layers.rms_norm_specs(
    config.hidden_size, from_one=config.norm_from_one
  )


def layer_specs(config: config_lib.LlamaConfig, layer: int) -> dict[str, Any]:
  """Returns the specs of one `block`'s parameters."""
  size = config.layer_mlp(layer).size
  return around_specs(config) | {
    'mlp': layers.mlp_specs(config, size, gated=True, bias=config.mlp_bias)
  }


def around_specs(config: config_lib.LlamaConfig) -> dict[str, Any]:
  """Returns the specs of all but the MLP's parameters."""
  attn = attention.attention_specs(
    config,
    qkv_bias=config.qkv_bias,
    o_bias=config.o_bias,
    qk_norm=config.qk_norm,
    qk_norm_is_wide=config.qk_norm_is_wide,
    norm_from_one=config.norm_from_one,
  )
  return {'attn': attn} | {
    f'{branch}{side}_norm': norm_specs(config)
    for branch in ('attn', 'mlp')
    for side in config_lib.NORMS[config.norms]
  }


def block(
  config: config_lib.LlamaConfig,
  params: layers.Params,
  layer_kv: attention.LayerKv,
  x: layers.Stream,
  context: attention.LayerContext,
) -> tuple[layers.Stream, attention.LayerKv]:
  """Adds attention, then the MLP, to the residual stream."""

  def mlp(x: Array) -> Array:
    return layers.gated_mlp(params['mlp'], x, config.activation, context.shards)

  return block_around(config, params, layer_kv, x, context, mlp)


def block_around(
  config: config_lib.LlamaConfig,
  params: layers.Params,
  layer_kv: attention.LayerKv,
  x: layers.Stream,
  context: attention.LayerContext,
  mlp: Callable[[Array], Array],
) -> tuple[layers.Stream, attention.LayerKv]:
  """Does as `block`, with an MLP that is given; on a shard, a part of it."""
  eps, scale = config.norm_eps, config.residual_scale
  x, layer_kv = attention.add_attention(
    config, params, layer_kv, x, context, norm=norm, scale=scale
  )
  x, normed = layers.read_stream(params, 'mlp', x, norm, eps)
  out = context.shards.sum(mlp(normed))
  added = layers.add_to_stream(
    params, 'mlp', x, out, norm, eps, scale, late=context.adds_late
  )
  return added, layer_kv
