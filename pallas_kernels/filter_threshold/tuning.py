# SPDX-License-Identifier: Apache-2.0
"""The sizes of the GPU kernel, by device, and what to take where."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses

from pallas_kernels import devices


@dataclasses.dataclass(frozen=True, slots=True)
class Sizes:
  """How much of a row the kernel holds; see `pallas_triton`.

  Attributes:
    tile: logits of a vector; a power of two.
    num_tiles: vectors that are read together, whose logits are the columns of
      the row's sketch.
    levels: logits of each column that the sketch has, the largest ones.
    num_warps: of a block of the GPU.
  """

  tile: int
  num_tiles: int
  levels: int
  num_warps: int

  @property
  def num_logits(self) -> int:
    """Logits that a sketch has."""
    return self.tile * self.num_tiles * self.levels

  def for_vocab(self, vocab_size: int) -> Sizes:
    """Returns these, or less where that holds a whole row."""
    fits = dataclasses.replace(self, num_tiles=1)
    while fits.num_tiles < self.num_tiles and fits.num_logits < vocab_size:
      fits = dataclasses.replace(fits, num_tiles=2 * fits.num_tiles)
    return fits


# By compute capability's target, see `gpu_targets.alike`. Chosen to compile
# without spills; `scripts/gpu_check --stages=filters` times others.
_SIZES: Mapping[str, Sizes] = {
  'a100': Sizes(2048, 4, 4, 16),
  'a40': Sizes(2048, 4, 4, 16),
  'h100': Sizes(2048, 4, 4, 16),
}
# Others worth trying, the most promising first; none spills on H100.
CANDIDATES: tuple[Sizes, ...] = (
  Sizes(1024, 4, 4, 8),
  Sizes(2048, 4, 2, 16),
  Sizes(1024, 4, 8, 8),
)
# What `implementation=None` means: Triton's kernel, until a measurement says
# otherwise.
_FASTEST: Mapping[str, str] = {}


def choose() -> Sizes:
  """Returns the sizes for the default device; CPUs interpret the kernel.

  Raises:
    NotImplementedError: the kernel can't run there.
  """
  device = devices.default()
  devices.check_triton(device)
  return _SIZES[devices.target_of(device)]


def fastest() -> str:
  """Returns the fastest implementation for the default device."""
  return devices.fastest(_FASTEST)
