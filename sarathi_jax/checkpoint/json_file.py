# SPDX-License-Identifier: Apache-2.0
"""Reads a checkpoint's JSON files."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from sarathi_jax import errors


def read(path: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON object from a file.

  Raises:
    CheckpointError: no such file, or not a JSON object.
  """
  try:
    value = json.loads(path.read_bytes())
  except FileNotFoundError as e:
    raise errors.CheckpointError(f'{path}: missing.') from e
  except (OSError, ValueError) as e:
    raise errors.CheckpointError(f'{path}: can not be read: {e}.') from e
  if not isinstance(value, dict):
    raise errors.CheckpointError(f'{path}: is not a JSON object.')
  return value
