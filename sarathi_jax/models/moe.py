# SPDX-License-Identifier: Apache-2.0
"""A mixture of experts: each token goes through those that it chooses.

Pairs of a token and an expert are sorted by experts, and each expert's rows are
multiplied by its matrices (`pallas_kernels.grouped_matmul`). So a step reads
the experts that its tokens chose, and no others; nothing is dropped, and what a
token gets does not depend on what the others in its batch chose. A shared
expert is an MLP beside them, of all tokens.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels import grouped_matmul
from sarathi_jax.models import config as config_lib
from sarathi_jax.models import layers
from sarathi_jax.models import matrices
from sarathi_jax.models import router
from sarathi_jax.models import sharding
from sarathi_jax.models import spec

_COLUMNS = ('experts', 'mlp')  # the axes of what devices have columns of


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
  experts, weights = router.route(config, params, x)
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
  if config.shared_size is not None:
    total += _shared(config, params, x, shards)
  if is_token is not None:
    total = jnp.where(is_token[:, None], total, 0)
  return total.astype(x.dtype)


def moe_specs(config: config_lib.MixtralConfig) -> dict[str, Any]:
  """Returns the specs of `moe`'s parameters."""
  num, width, inner = (
    config.num_experts,
    config.hidden_size,
    config.intermediate_size,
  )
  experts, mlp = ('whole_experts', None) if config.whole_experts else _COLUMNS
  into = spec.ParamSpec((num, width, inner), (experts, 'embed', mlp))
  specs = {
    'gate': into,
    'up': into,
    'down': spec.ParamSpec((num, inner, width), (experts, mlp, 'embed')),
  }
  if config.mlp_bias:
    specs |= {
      f'{name}_bias': spec.ParamSpec(
        (num, specs[name].shape[-1]), (experts, specs[name].axes[-1]), 'bias'
      )
      for name in ('gate', 'up', 'down')
    }
  return router.router_specs(config) | specs | _shared_specs(config)


def _shared(
  config: config_lib.MixtralConfig,
  params: layers.Params,
  x: Float[Array, 'T D'],
  shards: sharding.Shards,
) -> Float[Array, 'T D']:
  """Returns what the shared expert gives, in float32; on a shard, a part."""
  out = layers.gated_mlp(params['shared'], x, config.activation, shards)
  out = out.astype(jnp.float32)
  if not config.shared_gate:
    return out
  gate = matrices.matmul(x, params['shared_gate'], jnp.float32)
  return out * jax.nn.sigmoid(gate)


def _shared_specs(config: config_lib.MixtralConfig) -> dict[str, Any]:
  if config.shared_size is None:
    return {}
  specs: dict[str, Any] = {
    'shared': layers.mlp_specs(
      config, config.shared_size, gated=True, bias=config.mlp_bias
    )
  }
  if config.shared_gate:
    specs['shared_gate'] = spec.ParamSpec(
      (config.hidden_size, 1), ('embed', None)
    )
  return specs
