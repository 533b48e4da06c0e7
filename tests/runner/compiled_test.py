# SPDX-License-Identifier: Apache-2.0
"""What is compiled is found again: elsewhere, read only, on any host."""

from __future__ import annotations

import errno
import os
import pathlib

import jax
from jax._src import distributed
import jax.numpy as jnp
import pytest

from sarathi_jax import errors
from sarathi_jax.runner import compiled


@pytest.fixture(autouse=True)
def _the_users_own_wish(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.delenv('JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES', raising=False)


def compile_in(folder: pathlib.Path) -> int:
  """How many programs were compiled, and not found."""
  with compiled.kept_in(str(folder)):
    hits: list[str] = []

    def listen(event: str, **fields: str) -> None:
      if event == '/jax/compilation_cache/cache_hits':
        hits.append(event)

    jax.monitoring.register_event_listener(listen)
    try:
      shape = jax.ShapeDtypeStruct((8, 8), jnp.float32)
      jax.jit(lambda x: jnp.sin(x) @ x).lower(shape).compile()
    finally:
      jax.monitoring.unregister_event_listener(listen)
  return 1 - len(hits)


def test_a_folder_that_was_moved_has_all_that_it_had(
  tmp_path: pathlib.Path,
) -> None:
  assert compile_in(tmp_path / 'old') == 1
  os.rename(tmp_path / 'old', tmp_path / 'new')
  names = sorted(os.listdir(tmp_path / 'new'))
  assert compile_in(tmp_path / 'new') == 0
  assert sorted(os.listdir(tmp_path / 'new')) == names


def test_what_the_program_has_set_holds_again(tmp_path: pathlib.Path) -> None:
  before = dict(jax.config.values)
  for name in 'one', 'other':
    compile_in(tmp_path / name)
    assert jax.config.values == before
  names = sorted(os.listdir(tmp_path / 'other'))
  jax.jit(lambda x: jnp.cos(x) @ x).lower(
    jax.ShapeDtypeStruct((8, 8), jnp.float32)
  ).compile()
  assert sorted(os.listdir(tmp_path / 'other')) == names


def test_every_host_keeps_its_own(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """JAX has only the first process write, and CPUs' programs differ."""
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  monkeypatch.setattr(distributed.global_state, 'process_id', 1)
  assert compile_in(tmp_path) == 1
  assert os.listdir(tmp_path) == ['process_1']
  assert compile_in(tmp_path) == 0
  assert distributed.global_state.process_id == 1


def test_a_folder_that_can_only_be_read_is_read(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  assert compile_in(tmp_path) == 1
  names = sorted(os.listdir(tmp_path))
  monkeypatch.setattr(os, 'access', lambda path, mode: False)
  with pytest.warns(RuntimeWarning, match='are not kept') as warned:
    assert compile_in(tmp_path) == 0
  assert len(warned) == 1 and str(tmp_path) in str(warned[0].message)
  (tmp_path / next(n for n in names if 'lambda' in n)).unlink()
  with pytest.warns(RuntimeWarning, match='are not kept') as warned:
    assert compile_in(tmp_path) == 1
  assert len(warned) == 1  # JAX does not try, and warns of no file.
  assert not any('lambda' in name for name in os.listdir(tmp_path))


@pytest.mark.parametrize('number', [errno.EROFS, errno.EACCES])
def test_a_folder_that_can_not_be_made_is_gone_without(
  number: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  def refuse(*args: object, **fields: object) -> None:
    raise OSError(number, os.strerror(number))

  monkeypatch.setattr(pathlib.Path, 'mkdir', refuse)
  with (
    pytest.warns(RuntimeWarning, match='are not kept'),
    compiled.kept_in(str(tmp_path / 'none')),
  ):
    pass


def test_a_folder_that_is_none_is_an_error(tmp_path: pathlib.Path) -> None:
  (tmp_path / 'file').touch()
  with (
    pytest.raises(errors.ConfigError, match='Not a directory'),
    compiled.kept_in(str(tmp_path / 'file' / 'compiled')),
  ):
    pass
