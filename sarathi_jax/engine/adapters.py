# SPDX-License-Identifier: Apache-2.0
"""The adapters that requests may name. No JAX."""

from __future__ import annotations

import collections
from collections.abc import Mapping
from typing import Any

from sarathi_jax import config as config_lib
from sarathi_jax import errors
from sarathi_jax import types


class Adapters:
  """What is loaded, by name. Any thread may look for one.

  Args:
    loaded: name -> the matrices of those that are there at the start.
    model_name: that of the model, which no adapter may have.
  """

  def __init__(self, loaded: Mapping[str, Any], model_name: str = '') -> None:
    self._model_name = model_name
    self._num_loaded: collections.Counter[str] = collections.Counter()
    self._named: Mapping[str, types.Adapter] = {}
    for name, matrices in loaded.items():
      self.load(name, matrices)

  @property
  def names(self) -> tuple[str, ...]:
    """Their names, in the order of their loading."""
    return tuple(self._named)

  @property
  def loaded(self) -> tuple[types.Adapter, ...]:
    """All, in the order of their loading."""
    return tuple(self._named.values())

  def find(self, name: str | None) -> types.Adapter | None:
    """Returns an adapter; None for the model as it is.

    Raises:
      NotFoundError: there is none of this name.
    """
    if name is None:
      return None
    if not isinstance(name, str) or name not in self._named:
      loaded = ', '.join(map(repr, self._named)) or 'none'
      raise errors.NotFoundError(
        f'adapter={errors.shown(name)}: must be one that is loaded: {loaded}.'
      )
    return self._named[name]

  def load(self, name: str, matrices: Any) -> None:
    """Lets requests name an adapter; of this name, the one before is gone.

    Requests that have it keep it until they end.

    Raises:
      ConfigError: the model has this name.
    """
    config_lib.check(
      name != self._model_name, 'adapters', name, "is the model's own name"
    )
    adapter = types.Adapter(name, self._num_loaded[name], matrices)
    self._num_loaded[name] += 1
    self._named = {**self._named, name: adapter}

  def unload(self, name: str) -> None:
    """Forgets an adapter; requests that have it keep it until they end.

    Raises:
      NotFoundError: there is none of this name.
    """
    self.find(name)
    self._named = {n: a for n, a in self._named.items() if n != name}
