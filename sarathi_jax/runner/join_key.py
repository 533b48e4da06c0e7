# SPDX-License-Identifier: Apache-2.0
"""Reads the secret by which one model's processes know each other. No JAX."""

from __future__ import annotations

import os
import pathlib
import secrets

from sarathi_jax import config as config_lib
from sarathi_jax import errors

_MIN_BYTES = 16


def read(path: pathlib.Path | None = None) -> bytes:
  """Returns the secret that proves that a process is one of ours.

  Args:
    path: a file that each host has; None: one in the user's home, which is
      made if need be, for hosts that share it.

  Raises:
    ConfigError: it can't be read, or is too short to be a secret.
  """
  try:
    if path is None:
      path = config_lib.default_cache_dir() / 'join_key'
      if not path.exists():
        _make(path)
    key = path.read_bytes().strip()
  except OSError as error:
    raise errors.ConfigError(
      f"join_key_file={str(path)!r}: can't be read: {error.strerror}."
    ) from error
  config_lib.check(
    len(key) >= _MIN_BYTES,
    'join_key_file',
    str(path),
    f'must hold a secret of at least {_MIN_BYTES} bytes',
  )
  return key


def _make(path: pathlib.Path) -> None:
  """Makes a key that only this user can read, as a whole or not at all."""
  path.parent.mkdir(parents=True, exist_ok=True)
  part = path.with_name(f'.{path.name}.{os.getpid()}.{secrets.token_hex(4)}')
  with open(
    os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600),
    'w',
    encoding='ascii',
  ) as file:
    file.write(secrets.token_hex(32) + '\n')
  try:
    os.link(part, path)
  except FileExistsError:
    pass  # Another process was faster, and all are to have the same.
  finally:
    part.unlink()
