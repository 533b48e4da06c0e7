# SPDX-License-Identifier: Apache-2.0
"""Keeps measurements as they are made, as a run may be interrupted."""

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
  'CUDA_ERROR_(ILLEGAL|MISALIGNED|INVALID_PC|LAUNCH|ASSERT|HARDWARE)'
)


def absent(error: Exception) -> Row:
  """Returns the row for what can't be measured here, and need not be.

  Raises:
    Exception: `error`, if nothing can be measured after it.
  """
  if _BROKEN.search(str(error)):
    raise error
  return {'absent': f'{type(error).__name__}: {error}'[:300]}


class Journal:
  """The rows of one stage, by point; a JSON line each in a file.

  Args:
    path: the file; what it holds already is done, except a last line that was
      cut off.

  Attributes:
    path: the file.
    rows: point -> what was measured there last.
    under_way: the point that a process began and did not end, if any.
    is_complete: whether all points of the stage were gone through.
  """

  def __init__(self, path: pathlib.Path) -> None:
    self.path = path
    self.rows: dict[str, Row] = {}
    self.under_way: str | None = None
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
    """Keeps a row in place of an earlier one of its point."""
    self._write({'point': point, **row})

  def add_broken(self, point: str, error: str) -> None:
    """Keeps that a point ended its process; the next one goes on after it."""
    self.add(point, {'error': error, 'broke': True})

  def measure(self, point: str, make_row: Callable[[], Row]) -> None:
    """Keeps what `make_row` returns, or its error, unless the point is done.

    Raises:
      SystemExit: the error broke the process. The next one goes on after it.
    """
    if point in self:
      return
    self._write({'began': point})
    try:
      row = make_row()
    except Exception as error:  # Of any kind: the other points are worth it.
      row = {'error': f'{type(error).__name__}: {error}'[:500]}
      if _BROKEN.search(str(error)):
        self.add_broken(point, row['error'])
        sys.exit(f'{point}: {row["error"]}')
    self.add(point, row)

  def complete(self) -> None:
    """Notes that all points were gone through."""
    self._write({'complete': True})

  def forget(self, point: str | None = None) -> None:
    """Forgets a point, so that it is measured anew; without one, all."""
    if point is not None:
      self._write({'forgotten': point})
      return
    self.path.unlink(missing_ok=True)
    self.rows.clear()
    self.under_way, self.is_complete = None, False

  def _take(self, line: Row) -> None:
    if point := line.get('began'):
      self.under_way = point
    elif point := line.get('forgotten'):
      self.rows.pop(point, None)
      self.is_complete = False
    elif 'point' in line:
      self.rows[line['point']] = line
      self.under_way, self.is_complete = None, False
    else:
      self.is_complete = True

  def _write(self, line: Row) -> None:
    with self.path.open('a') as file:
      if file.tell() and not self.path.read_text().endswith('\n'):
        file.write('\n')
      file.write(json.dumps(line) + '\n')
    self._take(line)
