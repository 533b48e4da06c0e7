# SPDX-License-Identifier: Apache-2.0
"""Live arrays, held to what a model takes before they are served."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from sarathi_jax import errors
from sarathi_jax import models
from sarathi_jax.models import config as model_config_lib

Params = Any  # a pytree of arrays, as models.param_specs says

_DTYPES = tuple(map(jnp.dtype, ('float32', 'bfloat16', 'float16')))


def _named_leaves(tree: Any) -> dict[str, Any]:
  leaves, _ = jax.tree.flatten_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator='.'): leaf
          for path, leaf in leaves}


def check_params(model: model_config_lib.ModelConfig, params: Params,
                 dtype: Any = None) -> Params:
  """Holds live arrays to what the model takes.

  Args:
    model: the model.
    params: its weights. Only names count: tuples may be lists.
    dtype: what they must be of; None for any that attention takes.

  Returns:
    The same arrays, as the tree of `models.param_specs`.

  Raises:
    ConfigError: a leaf is missing, unknown, deleted, or of another shape or
      dtype; names it.
  """
  tree = models.param_specs(model)
  specs, leaves = _named_leaves(tree), _named_leaves(params)
  for name in sorted(specs.keys() ^ leaves.keys()):
    kind = 'missing' if name in specs else 'unknown'
    raise errors.ConfigError(f'params.{name}: {kind} in a {model.family}.')
  for name, leaf in leaves.items():
    _check_leaf(name, leaf, specs[name].shape, dtype)
    dtype = leaf.dtype  # All as the first one.
  return jax.tree.unflatten(
    jax.tree.structure(tree), [leaves[name] for name in specs])


def devices_of(params: Params) -> set[jax.Device]:
  """All that any of them is on."""
  return set().union(*(leaf.devices() for leaf in jax.tree.leaves(params)))


def _check_leaf(name: str, leaf: Any, shape: tuple[int, ...],
                dtype: Any) -> None:
  def check(ok: bool, is_what: object, must_be: object) -> None:
    if not ok:
      raise errors.ConfigError(
        f'params.{name}: is {is_what}; must be {must_be}.')

  check(isinstance(leaf, jax.Array), f'a {type(leaf).__name__}',
        'a jax.Array')
  check(not leaf.is_deleted(), 'deleted, or donated to a computation',
        'alive while it is served')
  dtypes = _DTYPES if dtype is None else (dtype,)
  check(leaf.shape == shape and leaf.dtype in dtypes,
        f'{leaf.dtype}{list(leaf.shape)}',
        f'{" or ".join(map(str, dtypes))}{list(shape)}')
