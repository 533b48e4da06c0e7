# SPDX-License-Identifier: Apache-2.0
"""What `scripts/gpu_check` measures, a module a stage."""
