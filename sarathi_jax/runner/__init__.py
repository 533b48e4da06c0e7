# SPDX-License-Identifier: Apache-2.0
"""Computes batches on devices: packing, the compiled step, the KV cache."""
