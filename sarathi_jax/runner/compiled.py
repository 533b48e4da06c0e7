# SPDX-License-Identifier: Apache-2.0
"""Where compiled steps are kept between runs: JAX's own cache, set up."""

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

  What the program around it has set holds again behind the block.

  Args:
    folder: made if need be; one that can't be written is only read, with a
      warning. None: nothing is changed.

  Yields:
    Where steps are kept, to be found without tracing them; nowhere, if
    `folder` is None or there are several processes.

  Raises:
    ConfigError: it can't be.
  """
  if not folder:
    yield kept.NOWHERE
    return
  process = jax.process_index()
  if process:  # JAX's files are not written whole, so two may not share them.
    folder = str(pathlib.Path(folder) / f'process_{process}')
  is_writable = _make(folder)
  settings = {_DIR: folder, _LEAST_S: 0.0 if is_writable else _NEVER_S}
  # The path of XLA's own files, of matmuls' tuning, would be in the names of
  # JAX's: of a folder that was moved, nothing would be found. What was tuned
  # is in the compiled steps.
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
  # If anything was compiled without a cache, JAX would go on without.
  compilation_cache.reset_cache()


def _make(folder: str) -> bool:
  """Returns whether it can be written."""
  try:
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
  except OSError as error:
    if error.errno not in _READ_ONLY:
      raise errors.ConfigError(
        f'compilation_cache_dir={folder!r}: can\'t be made: {error.strerror}.'
      ) from error
  if os.access(folder, os.W_OK | os.X_OK):
    return True
  warnings.warn(
    f'Compiled steps are not kept: {folder} can\'t be written. Those that it '
    'has are used.', RuntimeWarning, stacklevel=2)
  return False


@contextlib.contextmanager
def _as_first() -> Iterator[None]:
  """Lets this process keep what it compiles: JAX lets only the first one."""
  state = distributed.global_state
  process, state.process_id = state.process_id, 0
  try:
    yield
  finally:
    state.process_id = process
