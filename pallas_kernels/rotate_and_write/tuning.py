# SPDX-License-Identifier: Apache-2.0
"""The sizes of the GPU kernel, and what to take where."""

from __future__ import annotations

from collections.abc import Mapping

from pallas_kernels import devices

# Numbers of a tile, some heads of a token: eight for each thread, 16 bytes in
# 16 bits.
TILE = 1024
NUM_WARPS = 4
# What `implementation=None` means for pages that are rows: the kernel, until a
# measurement says otherwise (`scripts/gpu_check --stages=write`).
_FASTEST: Mapping[str, str] = {}


def fastest() -> str:
  """Returns the fastest implementation for pages that are rows."""
  return _FASTEST.get(devices.measured_as(devices.default()), 'pallas_triton')
