# SPDX-License-Identifier: Apache-2.0
"""A file to which lines are added whole or, on a full disk, not at all."""

from __future__ import annotations

import contextlib
import os
import pathlib


class WholeLines:
  """Appends to a file that nobody else writes. Not thread-safe.

  Args:
    path: the file's, which is made if need be.

  Raises:
    OSError: the file can't be opened.

  Attributes:
    size: number of bytes that were written.
  """

  def __init__(self, path: str | pathlib.Path) -> None:
    self.size = 0
    self._is_cut = False
    self._file = open(path, 'ab', buffering=0)  # noqa: SIM115

  def write(self, lines: bytes) -> None:
    """Writes lines, with their newlines, at once.

    Raises:
      OSError: the lines can't be written; nothing of them is in the file.
      ValueError: the file is closed.
    """
    if self._is_cut:
      lines = b'\n' + lines
    rest = memoryview(lines)
    try:
      while rest:
        rest = rest[self._file.write(rest) or 0 :]
    except OSError:
      self._take_back(len(lines) - len(rest))
      raise
    self._is_cut = False
    self.size += len(lines)

  def close(self) -> None:
    with contextlib.suppress(OSError):  # There is nothing left to write.
      self._file.close()

  def _take_back(self, num_bytes: int) -> None:
    if num_bytes:
      try:
        end = os.fstat(self._file.fileno()).st_size
        os.ftruncate(self._file.fileno(), end - num_bytes)
      except OSError:
        self._is_cut = True  # The next line at least begins anew.
