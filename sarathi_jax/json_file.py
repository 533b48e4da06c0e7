# SPDX-License-Identifier: Apache-2.0
"""Reads JSON objects of files, which others wrote. Standard library only.

Stricter than `json`: a key that is there twice would count once, and what is
nested more deeply than anybody writes it ends Python's stack here or further
on.
"""

from __future__ import annotations

import collections
import json
import pathlib
from typing import Any

from sarathi_jax import errors

_MOST_LEVELS = 200  # of objects and lists within one another


def read(path: pathlib.Path) -> dict[str, Any]:
  """Reads a file that is a JSON object.

  Raises:
    CheckpointError: no such file, or it is none; see `parse`.
  """
  try:
    return parse(path.read_bytes())
  except FileNotFoundError as error:
    raise errors.CheckpointError(f'{path}: missing.') from error
  except (OSError, ValueError) as error:
    raise errors.CheckpointError(f'{path}: can not be read: {error}.') from (
      error
    )


def read_if_there(path: pathlib.Path) -> dict[str, Any]:
  """Reads a file that is a JSON object; returns {} without one.

  Raises:
    CheckpointError: it is no JSON object.
  """
  return read(path) if path.is_file() else {}


def parse(data: bytes) -> dict[str, Any]:
  """Returns the JSON object that a text in UTF-8 is.

  Raises:
    ValueError: it is none, has a key twice, or is nested too deeply.
  """
  try:
    value = json.loads(data.decode('utf-8-sig'), object_pairs_hook=_object)
    _check_levels(value)
  except UnicodeDecodeError as error:
    raise ValueError(f'not UTF-8: {error}') from error
  except RecursionError as error:
    raise ValueError('not JSON: nested too deeply') from error
  except ValueError as error:
    raise ValueError(f'not JSON: {error}') from error
  if not isinstance(value, dict):
    raise ValueError('must be a JSON object')
  return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  made = dict(pairs)
  if len(made) < len(pairs):
    ((twice, _),) = collections.Counter(n for n, _ in pairs).most_common(1)
    raise ValueError(f'{errors.cut(twice)} is there twice')
  return made


def _check_levels(value: Any) -> None:
  level = [value]
  for _ in range(_MOST_LEVELS):
    level = [
      inner
      for outer in level
      if isinstance(outer, (dict, list))
      for inner in (outer.values() if isinstance(outer, dict) else outer)
    ]
    if not level:
      return
  raise RecursionError
