# SPDX-License-Identifier: Apache-2.0
"""Adds to the residual stream, and normalizes it."""

from pallas_kernels.add_and_norm.api import IMPLEMENTATIONS
from pallas_kernels.add_and_norm.api import add_and_norm

__all__ = ['IMPLEMENTATIONS', 'add_and_norm']
