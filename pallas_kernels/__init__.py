# SPDX-License-Identifier: Apache-2.0
"""Kernels for serving, one folder an operation. Needs only JAX and NumPy.

Each folder holds `api` (what to call), `reference` (the definition), one
module an implementation, `arg_specs` (the cases that tests and benchmarks
share) and `bench`.
"""
