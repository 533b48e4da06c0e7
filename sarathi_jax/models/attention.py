# SPDX-License-Identifier: Apache-2.0
"""The attention of all families, but for where keys and values are kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import rotate_and_write
from sarathi_jax.models import config as config_lib
from sarathi_jax.models import kinds
from sarathi_jax.models import layers
from sarathi_jax.models import rope
from sarathi_jax.models import sharding
from sarathi_jax.models import spec

LayerKv = Any  # what an `Attend` keeps for one layer: a pytree, or None
Rows = Int[Array, ' S']
Sinks = Float[Array, ' H']
Attended = tuple[Float[Array, 'rows H h'], LayerKv]


class Attend(Protocol):
  """Keeps the new keys and values of one layer, and attends to all of them."""

  def __call__(
    self,
    layer_kv: LayerKv,
    q: Float[Array, 'rows H h'],
    k: Float[Array, 'T K h'],
    v: Float[Array, 'T K h'],
    *,
    options: kinds.AttentionOptions,
    rows: Rows | None,
    sinks: Sinks | None,
  ) -> Attended:
    """Attends; query head j reads key and value head j // G.

    Args:
      layer_kv: what this layer kept so far.
      q: queries, rotated.
      k: keys, rotated.
      v: values.
      options: of the layer's kind.
      rows: which of the T tokens the queries are of; None: all.
      sinks: for each query head a score of no key, neither scaled nor capped,
        which weighs among the others; None: there are none.

    Returns:
      The mix of values for every query, and the layer's new state.
    """


class LayerContext(NamedTuple):
  """A block's arguments beside its weights and the residual stream.

  Attributes:
    attend: (layer_kv, q, k, v, norms, sinks) -> what an `Attend` returns, of
      this kind and these rows; queries and keys are yet to be normalized, if
      there are norms of heads, and rotated.
    shards: how the weights are split over devices.
    rows: the tokens whose output is read; None: all. For the others the block
      computes keys and values only.
    is_token: of each row of the output, whether it is a token's, and no
      padding; None: all are.
    query_factors: see `rope.query_factors`.
    adds_late: whether the block may leave sums to who reads the stream, see
      `layers.read_stream`. That has no gradient on GPUs.
  """

  attend: Callable[..., Attended]
  shards: sharding.Shards = sharding.WHOLE
  rows: Rows | None = None
  is_token: Bool[Array, ' rows'] | None = None
  query_factors: Float[Array, ' T'] | None = None
  adds_late: bool = False

  def take(self, x: Float[Array, 'T D']) -> Float[Array, 'rows D']:
    """Returns the rows of x that are in `rows`."""
    return x if self.rows is None else x[self.rows]


def causal_attend(
  layer_kv: LayerKv,
  q: Float[Array, 'rows H h'],
  k: Float[Array, 'T K h'],
  v: Float[Array, 'T K h'],
  *,
  options: kinds.AttentionOptions,
  rows: Rows | None = None,
  sinks: Sinks | None = None,
) -> Attended:
  """Attends within one whole sequence, at positions 0 to T - 1, no cache.

  An `Attend` for training and tests, and the naive reference. Rows after a
  sequence's end may hold anything: no row before them reads them.
  """
  num_rows, num_heads, head_dim = q.shape
  grouped = q.reshape(num_rows, k.shape[1], -1, head_dim)
  scores = (
    jnp.einsum('tkgh,skh->kgts', grouped, k, preferred_element_type=jnp.float32)
    * options.scale
  )
  if options.soft_cap is not None:
    scores = options.soft_cap * jnp.tanh(scores / options.soft_cap)
  tokens = jnp.arange(k.shape[0])
  distance = (tokens if rows is None else rows)[:, None] - tokens[None, :]
  seen = distance >= 0
  if options.window is not None:
    seen &= distance < options.window
  scores = jnp.where(seen[None, None, :, :], scores, -jnp.inf)
  if sinks is not None:
    of_rows = sinks.astype(jnp.float32).reshape(*scores.shape[:2], 1, 1)
    of_rows = jnp.broadcast_to(of_rows, (*scores.shape[:3], 1))
    scores = jnp.concatenate((scores, of_rows), axis=-1)
  weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  if sinks is not None:
    weights = weights[..., :-1]
  out = jnp.einsum('kgts,skh->tkgh', weights, v)
  return out.reshape(num_rows, num_heads, head_dim), layer_kv


def turn_and_attend(
  attend: Attend,
  rotation: rope.Rotation,
  layer_kv: LayerKv,
  q: Float[Array, 'rows H h'],
  k: Float[Array, 'T K h'],
  v: Float[Array, 'T K h'],
  *,
  norms: rotate_and_write.HeadNorms | None,
  sinks: Sinks | None,
  options: kinds.AttentionOptions,
  rows: Rows | None,
) -> Attended:
  """Normalizes and rotates queries and keys before an `Attend` gets them.

  Args:
    attend, layer_kv, v, sinks, options, rows: see `Attend`.
    rotation: of every token, by the rotary embedding of the layer's kind.
    q: queries, as projected.
    k: keys, as projected.
    norms: of queries and of keys; None: there are none.
  """
  cos, sin = rotation
  of_queries = rotation if rows is None else (cos[rows], sin[rows])
  q_norm, k_norm = norms or (None, None)
  return attend(
    layer_kv,
    rotate_and_write.turn(q, of_queries, q_norm),
    rotate_and_write.turn(k, rotation, k_norm),
    v,
    options=options,
    rows=rows,
    sinks=sinks,
  )


def attention(
  config: config_lib.ModelConfig,
  params: layers.Params,
  layer_kv: LayerKv,
  x: Float[Array, 'T D'],
  context: LayerContext,
) -> tuple[Float[Array, 'rows D'], LayerKv]:
  """Projects, rotates, attends, and projects back; on a shard, a part of it.

  Heads of q and k are normalized first if `params` holds the norms (Qwen3); or
  all heads at once (OLMo-2).
  """
  norms = None
  if 'q_norm' in params:
    norms = (
      layers.head_norm(params['q_norm'], config.norm_eps),
      layers.head_norm(params['k_norm'], config.norm_eps),
    )
  q, k, v = layers.project_group(params, 'qkv', x, context.take)
  if 'q_wide_norm' in params:
    q, k = layers.wide_rms_norms(
      (params['q_wide_norm'], params['k_wide_norm']),
      (q, k),
      config.norm_eps,
      context.shards,
    )
  if context.query_factors is not None:  # Rotations change no lengths.
    factors = context.take(context.query_factors)[:, None]
    q = (q.astype(jnp.float32) * factors).astype(q.dtype)
  q, k, v = (x.reshape(x.shape[0], -1, config.head_dim) for x in (q, k, v))
  sinks = params['sinks'] if config.attention_sinks else None
  out, layer_kv = context.attend(layer_kv, q, k, v, norms=norms, sinks=sinks)
  out = out.reshape(q.shape[0], -1)
  return layers.project_out(params, 'o', out, context.shards), layer_kv


def add_attention(
  config: config_lib.ModelConfig,
  params: layers.Params,
  layer_kv: LayerKv,
  x: layers.Stream,
  context: LayerContext,
  *,
  norm: layers.Norm,
  scale: float = 1.0,
) -> tuple[layers.Stream, LayerKv]:
  """Attends, and adds the result to the residual stream; normalizes either.

  Args:
    config, layer_kv, x, context: see `attention`.
    params: of a block: 'attn', and its norms.
    norm: the family's norm, such as `layers.rms_norm`.
    scale: see `layers.add_to_stream`.

  Returns:
    The residual stream, of `context.rows`, and the layer's new state.
  """
  x, normed = layers.read_stream(params, 'attn', x, norm, config.norm_eps)
  out, layer_kv = attention(config, params['attn'], layer_kv, normed, context)
  added = layers.add_to_stream(
    params,
    'attn',
    context.take(x),
    context.shards.sum(out),
    norm,
    config.norm_eps,
    scale,
    late=context.adds_late,
  )
  return added, layer_kv


def attention_specs(
  config: config_lib.ModelConfig,
  *,
  qkv_bias: bool = False,
  o_bias: bool = False,
  qk_norm: bool = False,
  qk_norm_is_wide: bool = False,
  norm_from_one: bool = False,
) -> dict[str, Any]:
  """Returns the specs of `attention`'s parameters, a tree of ParamSpec."""
  width = ('embed', config.hidden_size)
  heads = ('heads', config.num_heads * config.head_dim)
  kv_heads = ('kv_heads', config.num_kv_heads * config.head_dim)
  inner = {'q': heads, 'k': kv_heads, 'v': kv_heads}
  specs: dict[str, Any] = {
    name: spec.matrix(width, axis) for name, axis in inner.items()
  }
  specs['o'] = spec.matrix(heads, width)
  if qkv_bias:
    specs |= {f'{name}_bias': spec.bias(axis) for name, axis in inner.items()}
  if o_bias:
    specs['o_bias'] = spec.bias(width)
  if config.attention_sinks:
    specs['sinks'] = spec.bias(('heads', config.num_heads))
  for name in ('q', 'k') if qk_norm else ():
    axis, size = inner[name] if qk_norm_is_wide else (None, config.head_dim)
    specs[f'{name}_wide_norm' if qk_norm_is_wide else f'{name}_norm'] = (
      layers.rms_norm_specs(size, axis, from_one=norm_from_one)
    )
  return specs
