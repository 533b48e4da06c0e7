# SPDX-License-Identifier: Apache-2.0
"""Computing batches on a device: packing, the compiled step, the KV cache."""
