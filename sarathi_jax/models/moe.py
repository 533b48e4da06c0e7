# SPDX-License-Identifier: Apache-2.0
"""A mixture of experts, computed densely.

Every expert computes every token, and the router's weights, most of them 0,
choose among the results. That costs E / experts_per_token times the arithmetic
of a grouped matmul. But a step of a few hundred tokens has to read all experts'
weights either way, nothing is dropped, and a token's result does not depend on
the others in its batch. (jax.lax.ragged_dot has a kernel on TPU only; elsewhere
it masks E copies of its input.)
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sarathi_jax.models import config as config_lib
from sarathi_jax.models import layers
from sarathi_jax.models import matrices
from sarathi_jax.models import spec


def route(
  config: config_lib.MixtralConfig,
  router: Float[Array, 'D E'],
  x: Float[Array, 'T D'],
) -> Float[Array, 'T E']:
  """Returns the experts' weights in float32: 0 for all but the chosen ones.

  Takes the softmax over all experts, and scales the top ones to sum to 1.
  """
  probs = jax.nn.softmax(
    matrices.matmul(x, router).astype(jnp.float32), axis=-1
  )
  top, experts = jax.lax.top_k(probs, config.experts_per_token)
  top = top / jnp.sum(top, axis=-1, keepdims=True)
  chosen = jax.nn.one_hot(experts, probs.shape[-1], dtype=top.dtype)
  return jnp.sum(chosen * top[:, :, None], axis=1)


def moe(
  config: config_lib.MixtralConfig,
  params: layers.Params,
  x: Float[Array, 'T D'],
) -> Float[Array, 'T D']:
  """Returns the weighted sum of the experts' gated MLPs; on a shard, a part."""
  weights = route(config, params['router'], x)
  # Each expert's own rows: of rows that all share, XLA on GPUs would make one
  # product, and to that end copy all experts' matrices in each step.
  rows = jnp.broadcast_to(x, (weights.shape[1], *x.shape))
  gate = layers.ACTIVATIONS[config.activation](
    matrices.matmul(rows, params['gate'])
  )
  inner = gate * matrices.matmul(rows, params['up'])
  out = matrices.matmul(inner, params['down'])
  weighted = out.astype(jnp.float32) * weights.T[:, :, None]
  return jnp.sum(weighted, axis=0).astype(x.dtype)


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
