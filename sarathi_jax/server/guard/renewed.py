# SPDX-License-Identifier: Apache-2.0
"""Files that may be renewed while we serve. Imports no gRPC and no JAX."""

from __future__ import annotations

from collections.abc import Callable
import pathlib
from typing import Generic, TypeVar

from absl import logging

from sarathi_jax import errors

T = TypeVar('T')


class Renewed(Generic[T]):
  """What some files say, read again once they have changed.

  Files that can't be read leave it as it was; the log says so.

  Args:
    what: what the log calls it, in the plural.
    paths: the files.
    read: reads them all.

  Raises:
    ConfigError: `read` raised it when this is made.
  """

  def __init__(
    self,
    what: str,
    paths: tuple[pathlib.Path, ...],
    read: Callable[[], T],
  ) -> None:
    self._what = what
    self._paths = paths
    self._read = read
    # Before the reading: what changes meanwhile is read once more.
    self._stamps, self._value = self._now(), read()

  def get(self) -> T:
    """Returns what the files say now, the same object while none changes."""
    if (now := self._now()) != self._stamps:
      try:
        self._value, self._stamps = self._read(), now
        logging.info('Read %s anew.', self._paths[0])
      except (OSError, errors.ConfigError) as error:
        logging.log_every_n_seconds(
          logging.ERROR, '%s stay as they were: %s', 10, self._what, error
        )
    return self._value

  def _now(self) -> list[tuple[int, int, int] | None]:
    return [_stamp(path) for path in self._paths]


def _stamp(path: pathlib.Path) -> tuple[int, int, int] | None:
  try:
    stat = path.stat()
  except OSError:
    return None
  return stat.st_mtime_ns, stat.st_size, stat.st_ino
