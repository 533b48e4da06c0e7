# SPDX-License-Identifier: Apache-2.0
"""Products with matrices in panels: those of CPUs."""

from pallas_kernels.llvm import COLUMNS
from pallas_kernels.panel_matmul.api import DTYPES
from pallas_kernels.panel_matmul.api import Coded
from pallas_kernels.panel_matmul.api import grouped_matmul
from pallas_kernels.panel_matmul.api import in_pairs
from pallas_kernels.panel_matmul.api import is_available
from pallas_kernels.panel_matmul.api import matmul
from pallas_kernels.panel_matmul.api import to_panels
from pallas_kernels.panel_matmul.reference import from_pairs
from pallas_kernels.panel_matmul.reference import from_panels

__all__ = [
  'COLUMNS',
  'DTYPES',
  'Coded',
  'from_pairs',
  'from_panels',
  'grouped_matmul',
  'in_pairs',
  'is_available',
  'matmul',
  'to_panels',
]
