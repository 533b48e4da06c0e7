# SPDX-License-Identifier: Apache-2.0
"""Makes folders that several processes may want at once. No JAX."""

from __future__ import annotations

from collections.abc import Callable
import os
import pathlib
import tempfile

from sarathi_jax import errors


def make(folder: pathlib.Path, fill: Callable[[pathlib.Path], object]) -> None:
  """Makes a folder that other processes see as a whole or not at all.

  Args:
    folder: the folder to make.
    fill: writes its files, to the temporary folder that it is given.

  Raises:
    CheckpointError: it can't be made.
  """
  try:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
      prefix=f'.{folder.name}.', dir=folder.parent, ignore_cleanup_errors=True
    ) as part:
      fill(pathlib.Path(part))
      os.chmod(part, 0o755)  # A temporary folder is private.
      os.rename(part, folder)
  except OSError as e:
    if not folder.is_dir():  # Another process may have been faster.
      raise errors.CheckpointError(
        f'cache_dir: {folder} can not be written: {e.strerror}.'
      ) from e
