# SPDX-License-Identifier: Apache-2.0
"""The sizes that Mosaic's kernels take; see `pallas_mosaic`."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses

from pallas_kernels import mosaic_devices
from pallas_kernels import mosaic_rows
from pallas_kernels.grouped_matmul import tuning

# Numbers of a row that are multiplied at a time: what shared memory has in a
# tile whose banks are exchanged, 128 bytes. Columns are multiples of it, too.
DEPTH = 64
ALIGNED = 8  # rows; copies begin at a multiple, as wgmma reads so many


@dataclasses.dataclass(frozen=True, slots=True)
class Sizes:
  """A tile.

  Attributes:
    warpgroups: that multiply, each 64 rows.
    columns: of a matrix; in the tables, of all kinds together.
    num_stages: steps of DEPTH that shared memory holds.
  """

  warpgroups: int
  columns: int
  num_stages: int

  @property
  def rows(self) -> int:
    return self.warpgroups * mosaic_rows.ROWS

  @property
  def most_of_group(self) -> int:
    """The most rows of a group, wherever these begin."""
    return self.rows - ALIGNED


# With so many rows for each group on average, at most -> the tile.
_AMPERE = ((64, Sizes(1, 128, 3)), (2**31, Sizes(2, 128, 3)))
_SIZES: Mapping[str, tuple[tuple[int, Sizes], ...]] = {
  '8.0': _AMPERE,
  '8.6': _AMPERE,
  '9.0': ((64, Sizes(1, 256, 4)), (2**31, Sizes(2, 256, 4))),
}


def choose(shape: tuning.Shape) -> Sizes:
  """Returns the sizes for a shape, on the default device; CPUs interpret.

  Raises:
    NotImplementedError: the kernel can't run there, or not for such a shape.
  """
  capability = mosaic_devices.capability()
  for name in ('num_in', 'num_out'):
    if (size := getattr(shape, name)) % DEPTH:
      raise NotImplementedError(
        f'pallas_mosaic: {name}={size}: must be a multiple of {DEPTH}.'
      )
  if shape.dtype not in ('bfloat16', 'float16'):
    raise NotImplementedError(
      f'pallas_mosaic: dtype={shape.dtype}: must be bfloat16 or float16.'
    )
  sizes = next(
    sizes
    for most, sizes in _SIZES[capability]
    if shape.num_rows <= most * shape.num_groups
  )
  most = max(sizes.columns // shape.num_kinds, DEPTH)
  return dataclasses.replace(sizes, columns=tuning.fitting(shape.num_out, most))
