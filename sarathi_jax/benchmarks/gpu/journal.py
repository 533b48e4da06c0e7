# SPDX-License-Identifier: Apache-2.0
"""What was measured, kept as it is measured: a run may be cut short."""

from __future__ import annotations

from collections.abc import Callable
import json
import pathlib
import re
import sys
from typing import Any

Row = dict[str, Any]
# CUDA's word for a kernel that breaks its process: nothing runs there after it.
_BROKEN = re.compile(
  'CUDA_ERROR_(ILLEGAL|MISALIGNED|INVALID_PC|LAUNCH|ASSERT|HARDWARE)')


def absent(error: Exception) -> Row:
  """The row of what can't be measured here, and need not be.

  Raises:
    Exception: `error`, if nothing can be measured after it.
  """
  if _BROKEN.search(str(error)):
    raise error
  return {'absent': f'{type(error).__name__}: {error}'[:300]}


class Journal:
  """The rows of one stage, by point; a JSON line each in a file.

  Args:
    path: the file; what it holds already is done. A last line that was cut
      is not.

  Attributes:
    rows: point -> what was measured there, last.
    is_complete: all points of the stage were gone through.
  """

  def __init__(self, path: pathlib.Path) -> None:
    self._path = path
    self.rows: dict[str, Row] = {}
    self.is_complete = False
    for line in path.read_text().splitlines() if path.exists() else ():
      try:
        self._take(json.loads(line))
      except json.JSONDecodeError:
        continue

  def __contains__(self, point: str) -> bool:
    row = self.rows.get(point, {'error': 'not measured'})
    return 'error' not in row or 'broke' in row

  @property
  def has_errors(self) -> bool:
    return any('error' in row for row in self.rows.values())

  def add(self, point: str, row: Row) -> None:
    """Keeps a row, in place of an earlier one of its point."""
    self._write({'point': point, **row})

  def measure(self, point: str, make_row: Callable[[], Row]) -> None:
    """Keeps what `make_row` returns, or its error; once.

    Raises:
      SystemExit: the error broke the process. The next one goes on after it.
    """
    if point in self:
      return
    try:
      row = make_row()
    except Exception as error:  # Of any kind: the other points are worth it.
      row = {'error': f'{type(error).__name__}: {error}'[:500]}
      if _BROKEN.search(str(error)):
        self.add(point, row | {'broke': True})
        sys.exit(f'{point}: {row["error"]}')
    self.add(point, row)

  def complete(self) -> None:
    """Notes that all points were gone through."""
    self._write({'complete': True})

  def forget(self) -> None:
    """Starts anew."""
    self._path.unlink(missing_ok=True)
    self.rows.clear()
    self.is_complete = False

  def _take(self, row: Row) -> None:
    if 'point' in row:
      self.rows[row['point']] = row
      self.is_complete = False
    else:
      self.is_complete = True

  def _write(self, row: Row) -> None:
    with self._path.open('a') as file:
      if file.tell() and not self._path.read_text().endswith('\n'):
        file.write('\n')
      file.write(json.dumps(row) + '\n')
    self._take(row)
