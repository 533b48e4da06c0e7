# SPDX-License-Identifier: Apache-2.0
"""The adapters that requests may name. No JAX."""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping
import itertools
import threading
from typing import Any

from sarathi_jax import config as config_lib
from sarathi_jax import errors
from sarathi_jax import types

# Reads an adapter's matrices again, in any thread.
Again = Callable[[], Any]


class Adapters:
  """What requests may name, by name. Any thread may look for one.

  Args:
    loaded: name -> the matrices of those that are there at the start.
    model_name: that of the model, which no adapter may have.
  """

  def __init__(self, loaded: Mapping[str, Any], model_name: str = '') -> None:
    self._model_name = model_name
    self._num_loaded: collections.Counter[str] = collections.Counter()
    self._named: Mapping[str, types.Adapter] = {}
    self._again: dict[str, Again] = {}
    self._away: Mapping[str, Again] = {}
    self._changes = threading.RLock()
    self._most: int | None = None
    self._times = itertools.count()
    self._last_asked: dict[str, int] = {}
    for name, matrices in loaded.items():
      self.load(name, matrices)
    self._stay = frozenset(loaded)

  def limit(self, most: int | None) -> None:
    """Says how many may be in memory; None for any number.

    Those of the start always are. Of the others, that goes which was not asked
    for the longest: until it is asked for, if it can be read again, or as if it
    was unloaded.
    """
    self._most = most

  @property
  def names(self) -> tuple[str, ...]:
    """Their names, in the order of their loading; then those that are away."""
    return (*self._named, *self._away)

  @property
  def loaded(self) -> tuple[types.Adapter, ...]:
    """Those in memory, in the order of their loading."""
    return tuple(self._named.values())

  def away(self, name: str | None) -> Again | None:
    """Returns what reads an adapter that went for others; None for all else."""
    return self._away.get(name) if isinstance(name, str) else None

  def find(self, name: str | None) -> types.Adapter | None:
    """Returns an adapter; None for the model as it is.

    One that went for others is read here and now.

    Raises:
      NotFoundError: there is none of this name.
      SarathiError: it can't be read again.
    """
    if name is None:
      return None
    named = self._named
    if isinstance(name, str) and name in named:
      self._last_asked[name] = next(self._times)
      return named[name]
    if again := self.away(name):
      return self.load(name, again(), again)
    raise errors.NotFoundError(
      f'adapter={errors.shown(name)}: must be one that is loaded: '
      f'{", ".join(map(repr, self.names)) or "none"}.'
      + (
        ''
        if self._most is None
        else f' Of more than max_cpu_loras={self._most}, those go that nobody '
        'asked for the longest; live arrays have to be loaded again.'
      )
    )

  def load(
    self, name: str, matrices: Any, again: Again | None = None
  ) -> types.Adapter:
    """Lets requests name an adapter; of this name, the one before is gone.

    Requests that have it keep it until they end.

    Args:
      name: of the adapter.
      matrices: see `types.Adapter`.
      again: reads them; None if they can't be read again.

    Returns:
      The adapter.

    Raises:
      ConfigError: the model has this name; or as many are loaded as may be, all
        since the start.
    """
    config_lib.check(
      name != self._model_name, 'adapters', name, "is the model's own name"
    )
    with self._changes:
      named, away = self._with_room(name)
      named[name] = types.Adapter(name, self._num_loaded[name], matrices)
      self._num_loaded[name] += 1
      self._last_asked[name] = next(self._times)
      self._again.pop(name, None)
      if again is not None:
        self._again[name] = again
      self._named, self._away = named, away
      return named[name]

  def unload(self, name: str) -> None:
    """Forgets an adapter; requests that have it keep it until they end.

    Raises:
      NotFoundError: there is none of this name.
    """
    with self._changes:
      if not self.away(name):
        self.find(name)
      self._named = {n: a for n, a in self._named.items() if n != name}
      self._away = {n: a for n, a in self._away.items() if n != name}
      self._last_asked.pop(name, None)
      self._again.pop(name, None)

  def _with_room(
    self, name: str
  ) -> tuple[dict[str, types.Adapter], dict[str, Again]]:
    """Returns those in memory and away once one more is loaded, but for it."""
    named = dict(self._named)
    away = {n: a for n, a in self._away.items() if n != name}
    if name in named or self._most is None or len(named) < self._most:
      return named, away
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
    if again := self._again.pop(goes, None):
      away[goes] = again
    return named, away
