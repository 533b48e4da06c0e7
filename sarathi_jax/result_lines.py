# SPDX-License-Identifier: Apache-2.0
"""The file of results of an offline run, and what it holds. No JAX."""

from __future__ import annotations

from collections.abc import Mapping
import contextlib
import json
import os
import pathlib
from typing import Any, NamedTuple

from sarathi_jax import batch_files
from sarathi_jax import errors
from sarathi_jax import json_file

# Of results of ours.
_BEGINNINGS = b'{"request_id": ', b'{"id": "batch_req_'


class Written(NamedTuple):
  """What an output file holds: ids that are done, numbers of refused lines."""

  ids: set[str]
  lines: set[int]


def read_written(path: pathlib.Path) -> Written:
  """Reads what an output holds; removes a last line that was cut off."""
  written = Written(set(), set())
  whole = 0
  with path.open('rb') as file:
    for number, line in enumerate(file, 1):
      is_cut = not line.endswith(b'\n')
      try:
        _add(line, Written(set(), set()) if is_cut else written)
      except (ValueError, KeyError, TypeError):
        if not (is_cut and _may_be_ours(line)):
          raise errors.ConfigError(
            f'output={str(path)!r}: line {number} is not one of our results; '
            "won't go on with this file."
          ) from None
      whole += 0 if is_cut else len(line)
  if whole < path.stat().st_size:
    os.truncate(path, whole)
  return written


def _add(line: bytes, written: Written) -> None:
  """Notes what a line stands for.

  Raises:
    ValueError, KeyError, TypeError: it is no result of ours.
  """
  result = json_file.parse(line)
  if batch_files.KEYS & result.keys():
    batch_files.add_written(result, written.ids, written.lines)
  elif 'error' in result:
    written.lines.add(result['line'])
  else:
    # An input, given by mistake, has ids only.
    result['outputs' if 'outputs' in result else 'metrics']
    written.ids.add(str(result['request_id']))


def _may_be_ours(cut: bytes) -> bool:
  """Whether a line that was cut off begins as a result of ours does."""
  with contextlib.suppress(ValueError):
    json_file.parse(cut)
    return False  # It is whole.
  return any(begin.startswith(cut[: len(begin)]) for begin in _BEGINNINGS)


def has_failed(result: Mapping[str, Any]) -> bool:
  """Whether a result tells of an error."""
  if batch_files.KEYS & result.keys():
    return batch_files.has_failed(result)
  return 'error' in result


class Output:
  """The file of results, each written at once.

  Args:
    path: of the file.
    resume: whether it may exist.

  Attributes:
    written: what it held.

  Raises:
    ConfigError: it can't be written, or is of something else.
  """

  def __init__(self, path: pathlib.Path, resume: bool) -> None:
    self._path = path
    self.written = Written(set(), set())
    try:
      if path.is_file() and path.stat().st_size:
        if not resume:
          raise errors.ConfigError(
            f'output={str(path)!r}: exists; --resume goes on with it.'
          )
        self.written = read_written(path)
      self._file = path.open('ab', buffering=0)
    except OSError as error:
      raise self._error(error) from error

  def close(self) -> None:
    self._file.close()

  def _error(self, error: OSError, hint: str = '') -> errors.ConfigError:
    return errors.ConfigError(
      f"output={str(self._path)!r}: can't be written: {error.strerror}{hint}."
    )

  def write(self, result: Mapping[str, Any]) -> None:
    """Writes a line; ConfigError if it can't."""
    text = json.dumps(result, ensure_ascii=False) + '\n'
    # Half a pair of UTF-16 has no UTF-8; what it becomes is JSON's escape.
    rest = memoryview(text.encode('utf-8', 'backslashreplace'))
    try:
      while rest:
        rest = rest[self._file.write(rest) :]
    except OSError as error:
      raise self._error(
        error, '; --resume goes on with what is missing'
      ) from error
