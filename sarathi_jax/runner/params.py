# SPDX-License-Identifier: Apache-2.0
"""Checks that live arrays are what a model takes, before they are served."""

from __future__ import annotations

from collections.abc import Iterable
import difflib
import re
from typing import Any

import jax
import jax.numpy as jnp

from sarathi_jax import errors
from sarathi_jax import models
from sarathi_jax.models import config as model_config_lib
from sarathi_jax.models import spec
from sarathi_jax.models import tree as tree_lib
from sarathi_jax.runner import alive
from sarathi_jax.runner import qarrays

Params = Any  # a pytree of arrays, as models.param_specs says

_BOX = 'value'  # The name of the array in flax's boxes, such as nnx.Param.
_MOST_OUTER = 2  # Outer keys that a message names: {'params': ...}.
DTYPES = tuple(map(jnp.dtype, ('float32', 'bfloat16', 'float16')))


def check_params(
  model: model_config_lib.ModelConfig, params: Params, dtype: Any = None
) -> Params:
  """Checks that live arrays are what the model takes.

  Args:
    model: the model.
    params: its weights. Only names count: tuples may be lists, and nodes dicts.
      Matrices that the model quantizes may be QArrays, see `qarrays`.
    dtype: the dtype that they must have; None for any that attention takes.
      Those that have their own, by `ParamSpec.dtype`, must have that.

  Returns:
    The same arrays, as the tree of `models.param_specs`.

  Raises:
    ConfigError: a leaf is missing, unknown, deleted, or of another shape or
      dtype, or of one that the model can't be computed in. Names it, and says
      what to hand over if the tree is nearly right.
  """
  tree = models.param_specs(model)
  specs, leaves = tree_lib.named_leaves(tree), tree_lib.named_leaves(params)
  if not leaves or '' in leaves:  # '' names a tree that is one leaf.
    raise errors.ConfigError(
      f'params: is a {type(params).__name__}; must be a tree of arrays, as '
      'models.param_specs says.'
    )
  leaves = dict(qarrays.adopt(model, leaves))
  unknown, missing = leaves.keys() - specs.keys(), specs.keys() - leaves.keys()
  # A leaf of the layers is the most informative.
  for name in sorted(unknown, key=lambda name: ('layers' not in name, name))[
    :1
  ]:
    if problem := _packed(name, specs):
      raise errors.ConfigError(problem)
  for names, is_what, others, are_what in (
    (missing, 'missing', unknown, 'Found is'),
    (unknown, 'unknown', missing, 'Wanted is'),
  ):
    if names:
      name = min(names)
      near = difflib.get_close_matches(name, sorted(others), 1, cutoff=0)
      raise errors.ConfigError(
        f'params.{name}: {is_what} in a {model.family}.'
        + (f' {are_what} params.{near[0]}.' if near else '')
      )
  for name, leaf in leaves.items():
    _check_leaf(name, leaf, specs[name], dtype)
  if dtype is None:
    model.check_dtype(dtype_of(model, leaves).name)
  return tree_lib.with_leaves(tree, leaves)


def _packed(found: str, specs: Iterable[str]) -> str | None:
  """Says what is wrong with a tree of the right leaves in a wrong structure.

  Returns None if the leaf is not a right one.

  Args:
    found: the name of a leaf that is not wanted.
    specs: names of the wanted leaves.
  """
  names = found.split('.')
  unboxed = [name for name in names if name != _BOX]
  for outer in range(_MOST_OUTER + 1):
    inner = '.'.join(unboxed[outer:])
    for wanted in specs:
      is_stacked = inner != wanted and inner == re.sub(
        r'^layers\.\d+\.', 'layers.', wanted
      )
      if inner != wanted and not is_stacked:
        continue
      path = ''.join(
        f'[{name if name.isdigit() else repr(name)}]' for name in names[:outer]
      )
      remedies = [
        remedy
        for is_so, remedy in (
          (outer, f'hand over what is in its {path}'),
          (
            len(unboxed) < len(names),
            'take the arrays out of their boxes, as '
            'flax.nnx.to_pure_dict(state) and flax.core.meta.unbox(tree) do',
          ),
          (
            is_stacked,
            'make layers a list, of one tree a layer: [jax.tree.map('
            'lambda x: x[i], layers) for i in range(num_layers)]',
          ),
        )
        if is_so
      ]
      return (
        f'params.{found}: found where params.{wanted} is wanted: '
        f'{"; ".join(remedies)}.'
      )
  return None


def dtype_of(model: model_config_lib.ModelConfig, params: Params) -> Any:
  """Returns the dtype of all arrays, but for those that have their own.

  Raises:
    ConfigError: there are several. Names an array of each.
  """
  specs = tree_lib.named_leaves(models.param_specs(model))
  found = {
    leaf.dtype: name
    for name, leaf in tree_lib.named_leaves(params).items()
    if specs[name].dtype is None
  }
  if len(found) > 1:
    raise errors.ConfigError(
      'params: must be in one dtype, which is computed in; '
      + ', '.join(f'{name} is {dtype}' for dtype, name in found.items())
      + '.'
    )
  return next(iter(found))


def devices_of(params: Params) -> set[jax.Device]:
  """Returns all devices that hold a part of the parameters."""
  return set().union(*(leaf.devices() for leaf in jax.tree.leaves(params)))


def _check_leaf(
  name: str, leaf: Any, wanted: spec.ParamSpec, dtype: Any
) -> None:
  alive.check(name, leaf)
  dtypes = DTYPES if dtype is None else (dtype,)
  if wanted.dtype is not None:
    dtypes = (jnp.dtype(wanted.dtype),)
  if leaf.shape != wanted.shape or leaf.dtype not in dtypes:
    raise errors.ConfigError(
      f'params.{name}: is {leaf.dtype}{list(leaf.shape)}; must be '
      f'{" or ".join(map(str, dtypes))}{list(wanted.shape)}.'
    )
