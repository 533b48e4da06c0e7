# SPDX-License-Identifier: Apache-2.0
"""Attention of a hybrid batch, decodes and prefill chunks, over paged KV."""

from pallas_kernels.ragged_paged_attention.api import IMPLEMENTATIONS
from pallas_kernels.ragged_paged_attention.api import init_pages
from pallas_kernels.ragged_paged_attention.api import make_plan
from pallas_kernels.ragged_paged_attention.api import most_pages
from pallas_kernels.ragged_paged_attention.api import pages_from_rows
from pallas_kernels.ragged_paged_attention.api import query_dtype
from pallas_kernels.ragged_paged_attention.api import ragged_paged_attention
from pallas_kernels.ragged_paged_attention.api import write_kv
from pallas_kernels.ragged_paged_attention.layout import is_rows
from pallas_kernels.ragged_paged_attention.quantization import Quantized
from pallas_kernels.ragged_paged_attention.quantization import quantize
from pallas_kernels.ragged_paged_attention.validate import dynamic_validate
from pallas_kernels.ragged_paged_attention.validate import static_validate

__all__ = [
  'IMPLEMENTATIONS',
  'Quantized',
  'dynamic_validate',
  'init_pages',
  'is_rows',
  'make_plan',
  'most_pages',
  'pages_from_rows',
  'quantize',
  'query_dtype',
  'ragged_paged_attention',
  'static_validate',
  'write_kv',
]
