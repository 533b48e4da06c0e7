# SPDX-License-Identifier: Apache-2.0
"""The least logit of each row that top-k and top-p keep."""

from pallas_kernels.filter_threshold.api import IMPLEMENTATIONS
from pallas_kernels.filter_threshold.api import least_kept

__all__ = ['IMPLEMENTATIONS', 'least_kept']
