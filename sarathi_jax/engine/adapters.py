# SPDX-License-Identifier: Apache-2.0
"""The adapters that requests may name. No JAX."""

from __future__ import annotations

import collections
from collections.abc import Mapping
import itertools
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
    self._most: int | None = None
    self._times = itertools.count()
    self._last_asked: dict[str, int] = {}
    for name, matrices in loaded.items():
      self.load(name, matrices)
    self._stay = frozenset(loaded)

  def limit(self, most: int | None) -> None:
    """Says how many may be loaded; None for any number.

    Those of the start always are. Of the others, that goes which was not asked
    for the longest, as if it was unloaded.
    """
    self._most = most

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
    self._last_asked[name] = next(self._times)
    return self._named[name]

  def load(self, name: str, matrices: Any) -> None:
    """Lets requests name an adapter; of this name, the one before is gone.

    Requests that have it keep it until they end.

    Raises:
      ConfigError: the model has this name; or as many are loaded as may be, all
        since the start.
    """
    config_lib.check(
      name != self._model_name, 'adapters', name, "is the model's own name"
    )
    named = self._with_room(name)
    named[name] = types.Adapter(name, self._num_loaded[name], matrices)
    self._num_loaded[name] += 1
    self._last_asked[name] = next(self._times)
    self._named = named

  def unload(self, name: str) -> None:
    """Forgets an adapter; requests that have it keep it until they end.

    Raises:
      NotFoundError: there is none of this name.
    """
    self.find(name)
    self._named = {n: a for n, a in self._named.items() if n != name}
    self._last_asked.pop(name, None)

  def _with_room(self, name: str) -> dict[str, types.Adapter]:
    """Returns those that stay where one more is loaded, of this name."""
    named = dict(self._named)
    if name in named or self._most is None or len(named) < self._most:
      return named
    others = named.keys() - self._stay
    config_lib.check(
      bool(others),
      'max_cpu_loras',
      self._most,
      f'leaves no room for adapter {errors.shown(name)}, as those of the start '
      'stay',
    )
    goes = min(others, key=lambda n: self._last_asked.get(n, -1))
    del named[goes], self._last_asked[goes]
    return named
