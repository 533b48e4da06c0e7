# SPDX-License-Identifier: Apache-2.0
"""The page tables that a step is sent: of each group of layers what it needs.

Layers form groups, each with a sliding window, or none (`page_groups`). What a
group with a window reads begins at the window of a row's first token, and so
does the table that it is sent; there it is as if the sequence began. Attention
asks only how far keys are before queries, so that changes nothing.

Takes arrays of NumPy and of JAX alike; loads no JAX.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np

from sarathi_jax import page_groups


@dataclasses.dataclass(frozen=True, slots=True)
class PageTables:
  """How the tables of a sequence lie side by side.

  Attributes:
    windows: of each group; None where a table is sent whole.
    page_size: tokens in a page.
    places: of a whole table.
    num_tokens: the most that a sequence computes in a step.
  """

  windows: page_groups.Windows
  page_size: int
  places: int
  num_tokens: int

  @property
  def widths(self) -> tuple[int, ...]:
    """The places of each group's table."""
    most = self.places * self.page_size
    return tuple(
      page_groups.num_pages((window,), most, self.page_size, self.num_tokens)
      for window in self.windows
    )

  @property
  def size(self) -> int:
    """The places of all groups' tables."""
    return sum(self.widths)

  def first_places(self, window: int | None, starts: Any) -> Any:
    """Returns the first place in a group's table of each sequence.

    Args:
      window: of the group.
      starts: int32 array, the position of each one's first token in a step.
    """
    if window is None:
      return starts * 0
    # Arrays of both kinds have no maximum() in common.
    after = starts - window + 1
    return after * (after > 0).astype(np.int32) // self.page_size

  def write(
    self,
    tables: np.ndarray,
    slots: np.ndarray,
    starts: np.ndarray,
    out: np.ndarray,
  ) -> None:
    """Writes what is sent of some sequences to `out`, [n, size] int32.

    Args:
      tables: [slots, groups, places] int32, whole ones, contiguous.
      slots: [n] where each sequence's are.
      starts: [n], see `first_places`.
      out: is overwritten.
    """
    num_groups, places = tables.shape[1:]
    by_group = tables.reshape(-1, places)
    pages = by_group.reshape(-1)
    for group, (window, part) in enumerate(
      zip(self.windows, self.split(out), strict=True)
    ):
      rows = slots * num_groups + group
      # All that is taken is there; other modes copy it twice.
      if window is None:
        np.take(by_group, rows, axis=0, out=part, mode='clip')
        continue
      first = self.first_places(window, starts)[:, None]
      at = first + np.arange(part.shape[1])
      # Behind the last place nothing is read.
      np.minimum(at, places - 1, out=at)
      at += rows[:, None] * places
      np.take(pages, at, out=part, mode='clip')

  def split(self, sent: Any) -> list[Any]:
    """Returns each group's table, [n, width], of what is sent, [n, size]."""
    ends = [0, *itertools.accumulate(self.widths)]
    return [sent[:, start:stop] for start, stop in itertools.pairwise(ends)]
