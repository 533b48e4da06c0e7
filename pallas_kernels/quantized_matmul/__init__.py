# SPDX-License-Identifier: Apache-2.0
"""Products of rows with a matrix in codes, of which few bytes are read."""

from pallas_kernels.quantized_matmul.api import IMPLEMENTATIONS
from pallas_kernels.quantized_matmul.api import quantized_matmul
from pallas_kernels.quantized_matmul.operand import Operand
from pallas_kernels.quantized_matmul.rows import rounded

__all__ = ['IMPLEMENTATIONS', 'Operand', 'quantized_matmul', 'rounded']
