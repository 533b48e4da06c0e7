# SPDX-License-Identifier: Apache-2.0
"""Takes live arrays as a trainer has them, and hands them over as ours."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sarathi_jax import config as config_lib
from sarathi_jax import errors
from sarathi_jax import models
from sarathi_jax.in_process import layouts
from sarathi_jax.in_process import trees
from sarathi_jax.models import config as model_config_lib
from sarathi_jax.models import tree as tree_lib
from sarathi_jax.runner import params as params_lib

Params = Any  # a pytree of arrays, as models.param_specs says


class LiveParams:
  """A trainer's parameters, in its layout.

  Args:
    model: the model, as its user configured it.
    layout: see `layouts.layout_of`; None: of ours.

  Attributes:
    model: the model that is computed of them.
  """

  def __init__(
    self, model: model_config_lib.ModelConfig, layout: Any = None
  ) -> None:
    self._layout = None if layout is None else layouts.layout_of(layout)
    self._name = layout if isinstance(layout, str) else 'layout'
    self.model = model if self._layout is None else self._layout.model(model)
    self._convert: trees.Converter | None = None

  def wanted(self, dtype: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the leaves that are taken, by their names, to serve in `dtype`.

    In a layout of others', those of other dtypes are converted.
    """
    if self._layout is None:
      return {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype or dtype)
        for name, leaf in tree_lib.named_leaves(
          models.param_specs(self.model)
        ).items()
      }
    shapes = trees.shapes_of(self.model, self._layout.rows(self.model))
    return {
      name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()
    }

  def read(self, params: Any, dtype: Any = None) -> Any:
    """Returns parameters that were checked, for the methods below.

    Args:
      params: the trainer's.
      dtype: that they must have; None for any. In a layout of others', they
        are converted to it.

    Raises:
      ConfigError: one is missing, unknown, deleted, or of another shape.
    """
    if self._layout is None:
      return params_lib.check_params(self.model, params, dtype)
    leaves = layouts.named(self._layout, params)
    what = f'{self.model.family} ({self._name})'
    wanted = trees.shapes_of(self.model, self._layout.rows(self.model))
    trees.check(leaves, wanted, what)
    return leaves

  def dtype_of(self, read: Any, dtype: Any) -> Any:
    """Returns the dtype that is served in.

    Args:
      read: of `read`.
      dtype: what is asked for; None: that of the parameters.

    Raises:
      ConfigError: they have several, or one that the model can't have.
    """
    if self._layout is None:
      return params_lib.dtype_of(self.model, read)
    if dtype is None:
      rows = trees.rows_of(self.model, self._layout.rows(self.model))
      dtype = params_lib.dtype_of(
        self.model, {name: read[row.leaf.theirs] for name, row in rows.items()}
      )
    dtype = jnp.dtype(dtype)
    config_lib.check(
      dtype in params_lib.DTYPES,
      'params',
      str(dtype),
      f'must be {" or ".join(map(str, params_lib.DTYPES))}',
    )
    self.model.check_dtype(dtype.name)
    return dtype

  def begin(self, mesh: Mesh, dtype: Any) -> None:
    """Says where they are served, and in which dtype."""
    if self._layout is not None:
      self._convert = trees.Converter(
        self.model, self._layout.rows(self.model), mesh, dtype, self._name
      )

  def as_ours(self, read: Any) -> Params:
    """Returns the tree of `models.param_specs`; nothing may use the last one.

    Args:
      read: of `read`.

    Raises:
      ConfigError: there was no memory for a leaf, and some of the last tree
        are gone; call again.
    """
    if self._convert is None:
      return read
    try:
      return self._convert(read)
    except jax.errors.JaxRuntimeError as error:
      raise errors.ConfigError(
        "params: can't be laid out as they are served: "
        f'{errors.describe(error)}. Some of the old weights are gone; call '
        'update_params again.'
      ) from error
