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
from sarathi_jax.models import spec


def route(
  config: config_lib.MixtralConfig,
  router: Float[Array, 'D E'],
  x: Float[Array, 'T D'],
) -> tuple[Int[Array, 'T k'], Float[Array, 'T k']]:
  """Returns the experts that each token chooses, and their weights in float32.

  These are the top of the softmax over all experts, divided by their sum if
  the config says so.
  """
  probs = jax.nn.softmax(
    matrices.matmul(x, router).astype(jnp.float32), axis=-1
  )
  top, experts = jax.lax.top_k(probs, config.experts_per_token)
  if config.weights_sum_to_one:
    top = top / jnp.sum(top, axis=-1, keepdims=True)
  return experts, top


def moe(
  config: config_lib.MixtralConfig,
  params: layers.Params,
  x: Float[Array, 'T D'],
  is_token: Bool[Array, ' T'] | None = None,
) -> Float[Array, 'T D']:
  """Returns the weighted sum of the experts' gated MLPs; on a shard, a part.

  Args:
    config: the model.
    params: as `moe_specs` says.
    x: the tokens, normalized.
    is_token: which rows are tokens; None: all. The others choose no experts,
      and get 0.
  """
  experts, weights = route(config, params['router'], x)
  if is_token is not None:
    experts = jnp.where(is_token[:, None], experts, config.num_experts)
  groups = grouped_matmul.group(experts.reshape(-1), config.num_experts)

  def gated(gate: Array, up: Array) -> Array:
    return layers.ACTIVATIONS[config.activation](gate) * up

  inner = matrices.grouped_matmul(
    x,
    (params['gate'], params['up']),
    groups.sizes,
    rows=groups.order // config.experts_per_token,
    combine=gated,
  )
  out = matrices.grouped_matmul(inner, (params['down'],), groups.sizes)
  # Summed in the order of a token's own choice, whichever expert came first.
  chosen = out[groups.places].reshape(*experts.shape, -1).astype(jnp.float32)
  total = jnp.sum(chosen * weights[:, :, None], axis=1)
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
  into = spec.ParamSpec((num, width, inner), ('experts', 'embed', 'mlp'))
  return {
    'router': spec.ParamSpec((width, num), ('embed', None)),
    'gate': into,
    'up': into,
    'down': spec.ParamSpec((num, inner, width), ('experts', 'mlp', 'embed')),
  }
