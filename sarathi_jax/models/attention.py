# SPDX-License-Identifier: Apache-2.0
"""The attention of all families, but for where keys and values are kept."""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sarathi_jax.models import config as config_lib
from sarathi_jax.models import layers
from sarathi_jax.models import rope
from sarathi_jax.models import sharding
from sarathi_jax.models import spec

LayerKv = Any  # whatever `attend` keeps for one layer
Window = Any  # int | None, or what else the `attend` that is given takes
Rows = Int[Array, ' S']


class Attend(Protocol):
  """Keeps the new keys and values of one layer, and attends to all of them."""

  def __call__(
    self,
    layer_kv: LayerKv,
    q: Float[Array, 'rows H h'],
    k: Float[Array, 'T K h'],
    v: Float[Array, 'T K h'],
    *,
    scale: float,
    window: int | None,
    rows: Rows | None,
  ) -> tuple[Float[Array, 'rows H h'], LayerKv]:
    """Query head j reads key and value head j // G.

    Args:
      layer_kv: what this layer kept so far.
      q: queries, rotated.
      k: keys, rotated.
      v: values.
      scale: multiplies q . k.
      window: a token at p attends to (p - window, p]; None: to [0, p].
      rows: which of the T tokens the queries are of; None: all.

    Returns:
      The mix of values for every query, and the layer's new state.
    """


def causal_attend(
  layer_kv: LayerKv,
  q: Float[Array, 'rows H h'],
  k: Float[Array, 'T K h'],
  v: Float[Array, 'T K h'],
  *,
  scale: float,
  window: int | None,
  rows: Rows | None = None,
) -> tuple[Float[Array, 'rows H h'], LayerKv]:
  """An `Attend` for one whole sequence, at positions 0 to T - 1, no cache.

  For training, tests, and as the naive reference. Rows after a sequence's
  end may hold anything: none before them looks there.
  """
  num_rows, num_heads, head_dim = q.shape
  grouped = q.reshape(num_rows, k.shape[1], -1, head_dim)
  scores = jnp.einsum('tkgh,skh->kgts', grouped, k,
                      preferred_element_type=jnp.float32) * scale
  tokens = jnp.arange(k.shape[0])
  distance = (tokens if rows is None else rows)[:, None] - tokens[None, :]
  seen = distance >= 0
  if window is not None:
    seen &= distance < window
  scores = jnp.where(seen[None, None, :, :], scores, -jnp.inf)
  weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  out = jnp.einsum('kgts,skh->tkgh', weights, v)
  return out.reshape(num_rows, num_heads, head_dim), layer_kv


def attention(
  config: config_lib.ModelConfig,
  params: layers.Params,
  layer_kv: LayerKv,
  x: Float[Array, 'T D'],
  *,
  rotation: rope.Rotation,
  window: Window,
  attend: Attend,
  shards: sharding.Shards = sharding.WHOLE,
  rows: Rows | None = None,
) -> tuple[Float[Array, 'rows D'], LayerKv]:
  """Projects, rotates, attends, and projects back; of a shard, a part.

  Heads of q and k are normalized first if `params` holds the norms (Qwen3).
  Keys and values are of all tokens, queries of `rows` (None: of all, too).
  """
  def heads(name: str, x: jax.Array) -> jax.Array:
    split = layers.project(params, name, x).reshape(
      x.shape[0], -1, config.head_dim)
    norm = params.get(f'{name}_norm')
    return split if norm is None else layers.rms_norm(
      norm, split, config.norm_eps)

  asking = take(x, rows)
  cos, sin = rotation
  q = rope.apply(heads('q', asking), (take(cos, rows), take(sin, rows)))
  k = rope.apply(heads('k', x), rotation)
  out, layer_kv = attend(
    layer_kv, q, k, heads('v', x), scale=config.head_dim**-0.5, window=window,
    rows=rows)
  out = out.reshape(asking.shape[0], -1)
  return layers.project_out(params, 'o', out, shards), layer_kv


def take(x: Float[Array, 'T D'], rows: Rows | None) -> Float[Array, 'rows D']:
  """Some rows; None: all."""
  return x if rows is None else x[rows]


def add_attention(
  config: config_lib.ModelConfig,
  params: layers.Params,
  layer_kv: LayerKv,
  x: Float[Array, 'T D'],
  *,
  norm: Any,
  shards: sharding.Shards,
  rows: Rows | None,
  **attend: Any,
) -> tuple[Float[Array, 'rows D'], LayerKv]:
  """The residual stream, of `rows`, with the attention of its norm added.

  Args:
    config, layer_kv, x, shards, rows: see `attention`.
    params: of a block: 'attn_norm' and 'attn'.
    norm: of the family.
    **attend: what else `attention` takes.
  """
  normed = norm(params['attn_norm'], x, config.norm_eps)
  out, layer_kv = attention(
    config, params['attn'], layer_kv, normed, shards=shards, rows=rows,
    **attend)
  return take(x, rows) + shards.sum(out), layer_kv


def attention_specs(
  config: config_lib.ModelConfig,
  *,
  qkv_bias: bool = False,
  o_bias: bool = False,
  qk_norm: bool = False,
) -> dict[str, Any]:
  """Parameters of `attention`."""
  width = ('embed', config.hidden_size)
  heads = ('heads', config.num_heads * config.head_dim)
  kv_heads = ('kv_heads', config.num_kv_heads * config.head_dim)
  inner = {'q': heads, 'k': kv_heads, 'v': kv_heads}
  specs: dict[str, Any] = {
    name: spec.matrix(width, axis) for name, axis in inner.items()}
  specs['o'] = spec.matrix(heads, width)
  if qkv_bias:
    specs |= {f'{name}_bias': spec.bias(axis) for name, axis in inner.items()}
  if o_bias:
    specs['o_bias'] = spec.bias(width)
  if qk_norm:
    specs |= {f'{name}_norm': {'scale': spec.scale(config.head_dim, None)}
              for name in ('q', 'k')}
  return specs
