# SPDX-License-Identifier: Apache-2.0
"""The sizes that implementations take, and which of them where."""

from __future__ import annotations

# XLA's on CPUs: with so many rows for each group on average, at most -> rows of
# a block. Chosen by times on one core of an EPYC (Zen 4), float32: one row is
# multiplied as its matrix is read, in place, and of more rows the matrix is
# copied first, after which 16 rows or more are computed at 80 % of the rate.
_XLA_ROWS: tuple[tuple[int, int], ...] = ((4, 1), (8, 8), (64, 16))
_XLA_MOST_ROWS = 32


def xla_rows(num_rows: int, num_groups: int) -> int:
  """Returns the rows of a block of `xla`.

  Follows from shapes alone, so that no row's result depends on the others'.
  """
  for most, rows in _XLA_ROWS:
    if num_rows <= most * num_groups:
      return rows
  return _XLA_MOST_ROWS


def fastest() -> str:
  """Returns the fastest implementation for the default device."""
  return 'xla'
