# SPDX-License-Identifier: Apache-2.0
"""The sizes of the GPU kernel, and what to take where."""

from __future__ import annotations

from collections.abc import Mapping

from pallas_kernels import devices

# Numbers of a row for each warp: 16 a thread, two loads of 16 bytes in 16 bits.
_OF_A_WARP = 512
_MOST_WARPS = 16
# What `implementation=None` means on GPUs: the kernel, until a measurement says
# otherwise (`scripts/gpu_check --stages=write`).
_FASTEST: Mapping[str, str] = {}


def num_warps(width: int) -> int:
  """Returns the warps of a block, which has a row of so many numbers."""
  warps = max(width // _OF_A_WARP, 1)
  return min(1 << (warps.bit_length() - 1), _MOST_WARPS)


def fastest() -> str:
  """Returns the fastest implementation for the default device."""
  return devices.fastest(_FASTEST)
