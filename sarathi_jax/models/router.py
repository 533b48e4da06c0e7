# SPDX-License-Identifier: Apache-2.0
"""Chooses each token's experts, as a `RouterConfig` says."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sarathi_jax.models import config as config_lib
from sarathi_jax.models import layers
from sarathi_jax.models import matrices
from sarathi_jax.models import spec

_SCORES: Mapping[str, Callable[[Array], Array]] = {
  'softmax': lambda logits: jax.nn.softmax(logits, axis=-1),
  'sigmoid': jax.nn.sigmoid,
}
_LEAST = 1e-20  # added to sums of sigmoids, which may all be 0


def route(
  config: config_lib.MixtralConfig,
  params: layers.Params,
  x: Float[Array, 'T D'],
) -> tuple[Int[Array, 'T k'], Float[Array, 'T k']]:
  """Returns the experts that each token chooses, and their weights in float32.

  Args:
    config: the model.
    params: as `router_specs` says.
    x: the tokens, normalized.
  """
  router = config.router
  is_alone = router.score == 'sigmoid'
  # Rounded to 16 bits, logits would tie, or choose others than the makers' do;
  # and of one dtype, XLA would merge this product with the shared expert's, for
  # which it copies both matrices in each step.
  is_exact = is_alone or config.shared_size is not None
  logits = matrices.matmul(
    x, params['router'], jnp.float32 if is_exact else None
  ).astype(jnp.float32)
  if router.bias:
    logits += params['router_bias'][None, :].astype(logits.dtype)
  scores = _SCORES[router.score](logits)
  choice = scores
  if router.choice_bias:
    choice = choice + params['choice_bias'][None, :]
  if router.num_groups > 1:
    choice = _within_best_groups(choice, router.num_groups, router.top_groups)
  top, experts = jax.lax.top_k(choice, config.experts_per_token)
  if choice is not scores:
    top = jnp.take_along_axis(scores, experts, axis=-1)
  if router.sums_to_one:
    total = jnp.sum(top, axis=-1, keepdims=True)
    top = top / (total + _LEAST if is_alone else total)
  if router.scale != 1:
    top = top * router.scale
  return experts, top


def _within_best_groups(
  choice: Float[Array, 'T E'], num_groups: int, num_best: int
) -> Float[Array, 'T E']:
  """Returns -inf for the experts that are of no group that is chosen."""
  groups = choice.reshape(choice.shape[0], num_groups, -1)
  both, _ = jax.lax.top_k(groups, 2)
  _, best = jax.lax.top_k(jnp.sum(both, axis=-1), num_best)
  is_best = jnp.any(
    best[:, :, None] == jnp.arange(num_groups)[None, None, :], axis=1
  )
  chosen = jnp.where(is_best[:, :, None], groups, -jnp.inf)
  return chosen.reshape(choice.shape)


def router_specs(config: config_lib.MixtralConfig) -> dict[str, spec.ParamSpec]:
  """Returns the specs of `route`'s parameters."""
  num = config.num_experts
  specs = {'router': spec.ParamSpec((config.hidden_size, num), ('embed', None))}
  if config.router.bias:
    specs['router_bias'] = spec.bias((None, num))
  if config.router.choice_bias:
    specs['choice_bias'] = spec.bias((None, num), dtype='float32')
  return specs
