# SPDX-License-Identifier: Apache-2.0
"""Products of rows with the matrices of their groups, as experts take."""

from pallas_kernels.grouped_matmul.api import IMPLEMENTATIONS
from pallas_kernels.grouped_matmul.api import first
from pallas_kernels.grouped_matmul.api import grouped_matmul
from pallas_kernels.grouped_matmul.coded import Coded
from pallas_kernels.grouped_matmul.grouping import Groups
from pallas_kernels.grouped_matmul.grouping import group

__all__ = [
  'IMPLEMENTATIONS',
  'Coded',
  'Groups',
  'first',
  'group',
  'grouped_matmul',
]
