# SPDX-License-Identifier: Apache-2.0
"""Turns queries and keys, and writes keys and values to their pages."""

from pallas_kernels.rotate_and_write.api import IMPLEMENTATIONS
from pallas_kernels.rotate_and_write.api import rotate_and_write
from pallas_kernels.rotate_and_write.head_norm import HeadNorm
from pallas_kernels.rotate_and_write.head_norm import HeadNorms
from pallas_kernels.rotate_and_write.xla import turn

__all__ = [
  'IMPLEMENTATIONS',
  'HeadNorm',
  'HeadNorms',
  'rotate_and_write',
  'turn',
]
