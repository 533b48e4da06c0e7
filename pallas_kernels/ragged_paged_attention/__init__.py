# SPDX-License-Identifier: Apache-2.0
"""Attention of a hybrid batch, decodes and prefill chunks, over paged KV."""

from pallas_kernels.ragged_paged_attention.api import IMPLEMENTATIONS
from pallas_kernels.ragged_paged_attention.api import dynamic_validate
from pallas_kernels.ragged_paged_attention.api import init_pages
from pallas_kernels.ragged_paged_attention.api import make_plan
from pallas_kernels.ragged_paged_attention.api import pages_from_rows
from pallas_kernels.ragged_paged_attention.api import ragged_paged_attention
from pallas_kernels.ragged_paged_attention.api import static_validate
from pallas_kernels.ragged_paged_attention.api import write_kv

__all__ = [
  'IMPLEMENTATIONS',
  'dynamic_validate',
  'init_pages',
  'make_plan',
  'pages_from_rows',
  'ragged_paged_attention',
  'static_validate',
  'write_kv',
]
