# SPDX-License-Identifier: Apache-2.0
"""The small layers: norms, projections, MLPs. Statistics are in float32.

Sizes come from the arrays, never from a config, so that the same code runs on
a shard. There, `project_out` and the MLPs return one part of a sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import add_and_norm
from pallas_kernels import rotate_and_write
from sarathi_jax.models import config as config_lib
from sarathi_jax.models import matrices
from sarathi_jax.models import sharding
from sarathi_jax.models import spec

Params = Any  # pytree of arrays

ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
  'silu': jax.nn.silu,
  'gelu': functools.partial(jax.nn.gelu, approximate=False),
  'gelu_tanh': functools.partial(jax.nn.gelu, approximate=True),
  'relu': jax.nn.relu,
  'quick_gelu': lambda x: x * jax.nn.sigmoid(1.702 * x),
}


Norm = Callable[[Params, jax.Array, float], jax.Array]


class LateSum(NamedTuple):
  """A residual stream to which the output of a branch is yet to be added.

  Attributes:
    x: [T, D], the stream.
    out: [T, D], the output.
  """

  x: jax.Array
  out: jax.Array


Stream = jax.Array | LateSum  # the residual stream, between branches


def rms_norm(
  params: Params, x: Float[Array, '*rows D'], eps: float
) -> Float[Array, '*rows D']:
  """Divides by the root mean square over the last axis, and multiplies.

  By `scale`, or, in float32, by 1 + `offset`.
  """
  x32 = x.astype(jnp.float32)
  return _divided(params, x32, mean_square(x32), eps).astype(x.dtype)


def head_norm(params: Params, eps: float) -> rotate_and_write.HeadNorm:
  """Returns `rms_norm` of heads, to be done where they are rotated."""
  if 'offset' in params:
    return rotate_and_write.HeadNorm(params['offset'], eps, offset=1)
  return rotate_and_write.HeadNorm(params['scale'], eps)


def wide_rms_norms(
  params: Sequence[Params],
  parts: Sequence[Float[Array, 'rows part']],
  eps: float,
  shards: sharding.Shards,
) -> list[Float[Array, 'rows part']]:
  """Returns `rms_norm` of each, of rows that are split over shards.

  The mean squares of all are summed at once: what counts is how often devices
  wait for one another.
  """
  wide = [x.astype(jnp.float32) for x in parts]
  squares = shards.mean(jnp.concatenate([mean_square(x) for x in wide]))
  ends = list(itertools.accumulate(len(x) for x in parts))[:-1]
  return [
    _divided(p, x, square, eps).astype(part.dtype)
    for p, x, square, part in zip(
      params, wide, jnp.split(squares, ends), parts, strict=True
    )
  ]


def mean_square(x: Float[Array, '*rows D']) -> Float[Array, '*rows 1']:
  """Returns the mean of the squares of each row."""
  return jnp.mean(jnp.square(x), axis=-1, keepdims=True)


def _divided(params: Params, x: Array, square: Array, eps: float) -> Array:
  normed = x * jax.lax.rsqrt(square + eps)
  if 'offset' in params:
    return normed * (1 + _rows(params['offset'], x))
  return normed * _rows(params['scale'], x)


def layer_norm(
  params: Params, x: Float[Array, '*rows D'], eps: float
) -> Float[Array, '*rows D']:
  """Subtracts the mean, divides by the deviation, over the last axis."""
  x32 = x.astype(jnp.float32)
  x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
  variance = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
  normed = x32 * jax.lax.rsqrt(variance + eps)
  scaled = normed * _rows(params['scale'], x) + _rows(params['bias'], x)
  return scaled.astype(x.dtype)


def whole_stream(x: Stream) -> Float[Array, 'T D']:
  """Returns the residual stream as one array."""
  return x.x + x.out if isinstance(x, LateSum) else x


def read_stream(
  params: Params, branch: str, x: Stream, norm: Norm, eps: float
) -> tuple[Float[Array, 'T D'], Float[Array, 'T D']]:
  """Returns the residual stream, and what a branch of a block reads of it.

  A late sum is taken where it is normalized: in one launch, on GPUs.

  Args:
    params: of the block. It normalizes by '`branch`_norm', if that is there.
    branch: 'attn' or 'mlp'.
    x: the residual stream.
    norm, eps: the family's norm, such as `rms_norm`, and what that takes.
  """
  weights = params.get(f'{branch}_norm')
  if isinstance(x, LateSum) and weights is not None and norm is rms_norm:
    by = head_norm(weights, eps)
    return add_and_norm.add_and_norm(
      *x, by.weight, eps=by.eps, offset=by.offset
    )
  x = whole_stream(x)
  return x, x if weights is None else norm(weights, x, eps)


def add_to_stream(
  params: Params,
  branch: str,
  x: Float[Array, 'T D'],
  out: Float[Array, 'T D'],
  norm: Norm,
  eps: float,
  scale: float = 1.0,
  *,
  late: bool = False,
) -> Stream:
  """Adds what a branch gave, the sum of all shards, to the residual stream.

  It normalizes by '`branch`_out_norm', if that is there; see `read_stream`. And
  it multiplies by `scale`. If it is `late`, who reads the stream adds.
  """
  name = f'{branch}_out_norm'
  if name in params:
    out = norm(params[name], out, eps)
  if scale != 1:
    out = (out.astype(jnp.float32) * scale).astype(out.dtype)
  return LateSum(x, out) if late else x + out


def _rows(vector: jax.Array, like: jax.Array) -> jax.Array:
  """Returns a vector in float32 of `like`'s rank: ranks never promote."""
  return vector.astype(jnp.float32).reshape((1,) * (like.ndim - 1) + (-1,))


def project(
  params: Params, name: str, x: Float[Array, 'T D']
) -> Float[Array, 'T columns']:
  """Returns x @ params[name], plus the bias `name`_bias if there is one."""
  return _add_bias(matrices.matmul(x, params[name]), params.get(f'{name}_bias'))


def project_group(
  params: Params,
  group: str,
  x: Float[Array, 'T D'],
  take_first: Callable[[jax.Array], jax.Array] = lambda rows: rows,
) -> list[Float[Array, 'rows columns']]:
  """Returns `project` of each matrix of a group; in one product if it is one.

  Args:
    params: has the matrices, or the group.
    group: of `spec.GROUPS`.
    x: rows.
    take_first: takes the rows that the first matrix is to multiply. In a group
      that is one, it multiplies all, and the others are dropped.
  """
  names = spec.GROUPS[group]
  if group not in params:
    first, *others = names
    return [
      project(params, first, take_first(x)),
      *(project(params, name, x) for name in others),
    ]
  first, *others = params[group].multiply(x, params.get(f'{group}_bias'))
  return [take_first(first), *others]


def project_out(
  params: Params, name: str, x: Float[Array, 'T rows'], shards: sharding.Shards
) -> Float[Array, 'T D']:
  """Projects over rows that are split over shards: a part of the sum."""
  bias = params.get(f'{name}_bias')
  return _add_bias(
    matrices.matmul(x, params[name]),
    None if bias is None else shards.once(bias),
  )


def _add_bias(x: jax.Array, bias: jax.Array | None) -> jax.Array:
  return x if bias is None else x + bias[None, :]


def gated_mlp(
  params: Params,
  x: Float[Array, 'T D'],
  activation: str,
  shards: sharding.Shards = sharding.WHOLE,
) -> Float[Array, 'T D']:
  """Returns down(act(gate(x)) * up(x)), as in Llama; on a shard, a part."""
  gate, up = project_group(params, 'gate_up', x)
  return project_out(params, 'down', ACTIVATIONS[activation](gate) * up, shards)


def plain_mlp(
  params: Params,
  x: Float[Array, 'T D'],
  activation: str,
  shards: sharding.Shards = sharding.WHOLE,
) -> Float[Array, 'T D']:
  """Returns down(act(up(x))), as in Falcon; on a shard, a part."""
  up = ACTIVATIONS[activation](project(params, 'up', x))
  return project_out(params, 'down', up, shards)


def mlp_specs(
  config: config_lib.ModelConfig, size: int, *, gated: bool, bias: bool
) -> dict[str, spec.ParamSpec]:
  """Returns the specs of either MLP's parameters, `size` wide inside."""
  width = ('embed', config.hidden_size)
  inner = ('mlp', size)
  specs = {
    name: spec.matrix(width, inner)
    for name in (('gate', 'up') if gated else ('up',))
  }
  specs['down'] = spec.matrix(inner, width)
  if bias:
    specs |= {
      f'{name}_bias': spec.bias(width if name == 'down' else inner)
      for name in tuple(specs)
    }
  return specs


def rms_norm_specs(
  size: int, axis: str | None = 'embed', *, from_one: bool = False
) -> dict[str, spec.ParamSpec]:
  """Returns the specs of `rms_norm`'s parameters."""
  if from_one:
    return {'offset': spec.bias((axis, size))}
  return {'scale': spec.scale(size, axis)}


def layer_norm_specs(size: int) -> dict[str, spec.ParamSpec]:
  """Returns the specs of `layer_norm`'s parameters."""
  return {'scale': spec.scale(size), 'bias': spec.bias(('embed', size))}
