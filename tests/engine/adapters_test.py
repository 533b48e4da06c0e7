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


def test_of_too_many_that_goes_which_nobody_asked_for_the_longest() -> None:
  adapters = adapters_lib.Adapters({'stays': 0})
  adapters.limit(3)
  adapters.load('a', 1)
  adapters.load('b', 2)
  in_use = adapters.find('a')
  adapters.load('c', 3)
  assert adapters.names == ('stays', 'a', 'c')
  adapters.load('a', 4)  # In its own place.
  assert adapters.names == ('stays', 'a', 'c')
  adapters.find('c')
  adapters.load('d', 5)
  assert adapters.names == ('stays', 'c', 'd')
  assert in_use is not None and in_use.matrices == 1  # Whoever has it keeps it.
  adapters.load('b', 6)
  again = adapters.find('b')
  assert again is not None and again.generation == 1
  adapters.limit(1)
  adapters.unload('b')
  adapters.unload('d')
  with pytest.raises(
    errors.ConfigError, match=r"max_cpu_loras=1: .*'x'.*start"
  ):
    adapters.load('x', 7)


def test_what_goes_is_read_again_where_it_can_be() -> None:
  adapters = adapters_lib.Adapters({})
  adapters.limit(1)
  reads: list[str] = []

  def again() -> str:
    reads.append('a')
    if len(reads) == 2:
      raise errors.ConfigError('a: is gone.')
    return 'read again'

  first = adapters.load('a', 'read', again)
  adapters.load('live', 'arrays')
  assert adapters.names == ('live', 'a') and adapters.away('a') is again
  assert adapters.loaded == (adapters.find('live'),)
  second = adapters.find('a')
  assert second is not None and second.matrices == 'read again'
  assert (first.generation, second.generation) == (0, 1)
  assert adapters.names == ('a',) and adapters.away('a') is None
  with pytest.raises(errors.NotFoundError, match='live arrays have to be'):
    adapters.find('live')
  adapters.load('live', 'arrays')
  with pytest.raises(errors.ConfigError, match='is gone'):
    adapters.find('a')
  assert adapters.names == ('live', 'a')  # As before.
  adapters.unload('a')
  assert adapters.names == ('live',) and adapters.away('a') is None
  adapters.load('a', 'read', again)
  adapters.load('b', 'read', again)
  adapters.load('a', 'arrays')  # It is another now: nothing reads it again.
  assert adapters.names == ('a', 'b')
  adapters.find('b')
  assert adapters.names == ('b',) and len(reads) == 3


def test_adapters_that_come_and_go_leave_nothing() -> None:
  adapters = adapters_lib.Adapters({})
  adapters.limit(2)
  for i in range(100):
    adapters.load(f'a{i}', i)
  assert adapters.names == ('a98', 'a99')
  assert len(adapters._last_asked) == 2
