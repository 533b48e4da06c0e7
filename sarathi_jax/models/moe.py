# SPDX-License-Identifier: Apache-2.0
"""A mixture of experts: each token goes through those that it chooses.

Pairs of a token and an expert are sorted by experts, and each expert's rows are
multiplied by its matrices (`pallas_kernels.grouped_matmul`). So a step reads
the experts that its tokens chose, and no others; nothing is dropped, and what a
token gets does not depend on what the others in its batch chose.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import grouped_matmul
from sarathi_jax.models import config as config_lib
from sarathi_jax.models import layers
from sarathi_jax.models import matrices
from sarathi_jax.models import sharding
from sarathi_jax.models import spec

_COLUMNS = ('experts', 'mlp')  # the axes of what devices have columns of


def route(
  config: config_lib.MixtralConfig,
  router: Float[Array, 'D E'],
  x: Float[Array, 'T D'],
  bias: Float[Array, ' E'] | None = None,
) -> tuple[Int[Array, 'T k'], Float[Array, 'T k']]:
  """Returns the experts that each token chooses, and their weights in float32.

  These are the top of the softmax over all experts, divided by their sum if
  the config says so. A bias is added to the scores.
  """
  scores = matrices.matmul(x, router).astype(jnp.float32)
  if bias is not None:
    scores += bias[None, :].astype(scores.dtype)
  probs = jax.nn.softmax(scores, axis=-1)
  top, experts = jax.lax.top_k(probs, config.experts_per_token)
  if config.weights_sum_to_one:
    top = top / jnp.sum(top, axis=-1, keepdims=True)
  return experts, top


def moe(
  config: config_lib.MixtralConfig,
  params: layers.Params,
  x: Float[Array, 'T D'],
  is_token: Bool[Array, ' T'] | None = None,
  shards: sharding.Shards = sharding.WHOLE,
) -> Float[Array, 'T D']:
  """Returns the weighted sum of the experts' gated MLPs; on a shard, a part.

  Args:
    config: the model.
    params: as `moe_specs` says.
    x: the tokens, normalized.
    is_token: which rows are tokens; None: all. The others choose no experts,
      and get 0.
    shards: how the experts are split over devices: where these have whole
      ones, each computes its own experts' rows.
  """
  bias = params['router_bias'] if config.router_bias else None
  experts, weights = route(config, params['router'], x, bias)
  num = config.num_experts
  is_here = None if is_token is None else is_token[:, None]
  if config.whole_experts and shards.tp is not None:
    (num, *_) = jax.tree.leaves(params['gate'])[0].shape
    experts, is_mine = shards.mine(experts, num)
    is_here = is_mine if is_here is None else is_mine & is_here
  if is_here is not None:
    experts = jnp.where(is_here, experts, num)
  groups = grouped_matmul.group(experts.reshape(-1), num)

  def gated(gate: Array, up: Array) -> Array:
    if (limit := config.gate_limit) is not None:
      gate = jnp.minimum(gate, limit)
      up = jnp.clip(up, -limit, limit) + 1
    return layers.ACTIVATIONS[config.activation](gate) * up

  into: tuple[Array, ...] = ()
  back: tuple[Array, ...] = ()
  if config.mlp_bias:
    into = params['gate_bias'], params['up_bias']
    bias = params['down_bias']
    back = (bias if config.whole_experts else shards.once(bias),)

  inner = matrices.grouped_matmul(
    x,
    (params['gate'], params['up']),
    groups.sizes,
    rows=groups.order // config.experts_per_token,
    biases=into,
    combine=gated,
  )
  out = matrices.grouped_matmul(
    inner, (params['down'],), groups.sizes, biases=back
  )
  # Summed in the order of a token's own choice, whichever expert came first.
  chosen = out[groups.places].reshape(*experts.shape, -1).astype(jnp.float32)
  chosen *= weights[:, :, None]
  if config.whole_experts and is_here is not None:
    chosen = jnp.where(is_here[:, :, None], chosen, 0)
  total = jnp.sum(chosen, axis=1)
  if is_token is not None:
    total = jnp.where(is_token[:, None], total, 0)
  return total.astype(x.dtype)


def moe_specs(config: config_lib.MixtralConfig) -> dict[str, spec.ParamSpec]:
  """Returns the specs of `moe`'s parameters."""
  num, width, inner = (
    config.num_experts,
    config.hidden_size,
    config.intermediate_size,
  )
  experts, mlp = ('whole_experts', None) if config.whole_experts else _COLUMNS
  into = spec.ParamSpec((num, width, inner), (experts, 'embed', mlp))
  specs = {
    'router': spec.ParamSpec((width, num), ('embed', None)),
    'gate': into,
    'up': into,
    'down': spec.ParamSpec((num, inner, width), (experts, mlp, 'embed')),
  }
  if config.router_bias:
    specs['router_bias'] = spec.bias((None, num))
  if config.mlp_bias:
    specs |= {
      f'{name}_bias': spec.ParamSpec(
        (num, specs[name].shape[-1]), (experts, specs[name].axes[-1]), 'bias'
      )
      for name in ('gate', 'up', 'down')
    }
  return specs
