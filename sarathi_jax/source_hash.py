# SPDX-License-Identifier: Apache-2.0
"""Tells this code from any other. Imports nothing of ours."""

from __future__ import annotations

import functools
import hashlib
import pathlib

PACKAGES = ('sarathi_jax', 'pallas_kernels', 'checkpoints_convert')


@functools.cache
def source_hash() -> str:
  """Of all Python files of ours."""
  root = pathlib.Path(__file__).parents[1]
  digest = hashlib.sha256()
  for package in PACKAGES:
    for path in sorted((root / package).rglob('*.py')):
      digest.update(f'{path.relative_to(root)}\0'.encode())
      digest.update(hashlib.sha256(path.read_bytes()).digest())
  return digest.hexdigest()[:16]
