# SPDX-License-Identifier: Apache-2.0
"""Kernels for CPUs: LLVM's IR, compiled for this processor, called by XLA.

Pallas has no CPUs, and XLA's products of few rows take the time to read a
matrix and the time to multiply by it one after the other. `emit` writes IR,
`calls` makes it a function that XLA calls.
"""

COLUMNS = 16  # of a panel: of float32, a line of a processor's cache
