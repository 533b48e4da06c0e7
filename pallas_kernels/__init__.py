# SPDX-License-Identifier: Apache-2.0
"""Kernels for serving, one folder an operation. Needs only JAX and NumPy.

Each folder holds `api` (what to call), `reference` (the definition), one
module an implementation, `tuning` (what is taken on which device) and
`arg_specs` (the cases that tests and benchmarks share).
"""

import warnings

# JAX 0.11 and newer warn at every lowering. Nothing else serves Ampere.
warnings.filterwarnings(
  'ignore', '.*Pallas Triton backend is deprecated', DeprecationWarning
)
