# SPDX-License-Identifier: Apache-2.0
"""The measurements of `scripts/gpu_check`, one module for each stage."""
