# SPDX-License-Identifier: Apache-2.0
"""Sets up JAX's own cache, which keeps compiled steps between runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
import contextlib
import errno
import os
import pathlib
from typing import Any
import warnings

import jax
from jax._src import distributed  # It has no public name.
from jax.experimental.compilation_cache import compilation_cache

from sarathi_jax import errors
from sarathi_jax.runner import kept

_DIR = 'jax_compilation_cache_dir'
_LEAST_S = 'jax_persistent_cache_min_compile_time_secs'
_XLA_CACHES = 'jax_persistent_cache_enable_xla_caches'
_NEVER_S = 1e9
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


@contextlib.contextmanager
def kept_in(folder: str | None) -> Iterator[kept.Kept]:
  """Has JAX keep what is compiled in the block, and look there first.

  Restores the program's own settings after the block.

  Args:
    folder: is made if need be; one that can't be written is only read, with a
      warning. None: nothing is changed.

  Yields:
    The kept steps, which are found without tracing; none are kept if `folder`
    is None or there are several processes.

  Raises:
    ConfigError: the folder can't be made.
  """
  if not folder:
    yield kept.NOWHERE
    return
  process = jax.process_index()
  if process:  # JAX's files are not written whole, so two may not share them.
    folder = str(pathlib.Path(folder) / f'process_{process}')
  is_writable = _make(folder)
  settings = {_DIR: folder, _LEAST_S: 0.0 if is_writable else _NEVER_S}
  # The path of XLA's own files, which hold matmuls' tuning, would be part of
  # the names of JAX's, so nothing would be found in a folder that was moved.
  # The compiled steps include the tuning.
  if _XLA_CACHES.upper() not in os.environ:
    settings[_XLA_CACHES] = 'none'
  steps = kept.NOWHERE
  if jax.process_count() == 1:
    steps = kept.Kept(pathlib.Path(folder), is_writable)
  before = {name: jax.config.values[name] for name in settings}
  _set(settings)
  try:
    with _as_first():
      yield steps
  finally:
    _set(before)


def _set(settings: Mapping[str, Any]) -> None:
  for name, value in settings.items():
    jax.config.update(name, value)
  # If anything was compiled without a cache, JAX would go on without one.
  compilation_cache.reset_cache()


def _make(folder: str) -> bool:
  """Makes the folder if need be; returns whether it can be written."""
  try:
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
  except OSError as error:
    if error.errno not in _READ_ONLY:
      raise errors.ConfigError(
        f"compilation_cache_dir={folder!r}: can't be made: {error.strerror}."
      ) from error
  if os.access(folder, os.W_OK | os.X_OK):
    return True
  warnings.warn(
    f"Compiled steps are not kept: {folder} can't be written. Those that it "
    'has are used.',
    RuntimeWarning,
    stacklevel=2,
  )
  return False


@contextlib.contextmanager
def _as_first() -> Iterator[None]:
  """Lets this process keep what it compiles, as JAX lets the first one only."""
  state = distributed.global_state
  process, state.process_id = state.process_id, 0
  try:
    yield
  finally:
    state.process_id = process
