# SPDX-License-Identifier: Apache-2.0
"""Adapters have names, and numbers by which two of a name are told apart."""

from __future__ import annotations

import pytest

from sarathi_jax import errors
from sarathi_jax.engine import adapters as adapters_lib


def test_names_and_generations() -> None:
  adapters = adapters_lib.Adapters({'a': 1, 'b': 2}, 'model')
  first = adapters.find('a')
  assert first is not None and (first.generation, first.matrices) == (0, 1)
  assert adapters.find(None) is None
  adapters.load('a', 3)
  again = adapters.find('a')
  assert again is not None and again != first and again.generation == 1
  adapters.unload('a')
  assert adapters.names == ('b',)
  adapters.load('a', 4)
  last = adapters.find('a')
  assert last is not None and last.generation == 2
  assert adapters.names == ('b', 'a')


@pytest.mark.parametrize('name', ['c', '', 7, ['a']])
def test_what_is_not_loaded_is_named(name: object) -> None:
  adapters = adapters_lib.Adapters({'a': 1, 'b': 2})
  for call in (adapters.find, adapters.unload):
    with pytest.raises(errors.NotFoundError, match=r"adapter=.*: 'a', 'b'\."):
      call(name)  # type: ignore[operator]
  with pytest.raises(errors.NotFoundError, match='loaded: none'):
    adapters_lib.Adapters({}).find('a')


def test_the_models_name_is_its_own() -> None:
  with pytest.raises(errors.ConfigError, match="adapters='m': is the model's"):
    adapters_lib.Adapters({'m': 1}, 'm')
