# SPDX-License-Identifier: Apache-2.0
"""Tells this code from any other version. Imports no other module of ours."""

from __future__ import annotations

import functools
import hashlib
import pathlib

PACKAGES = ('sarathi_jax', 'pallas_kernels', 'checkpoints_convert')


@functools.cache
def source_hash() -> str:
  """Returns a hash of all our Python files, 16 hexadecimal digits."""
  root = pathlib.Path(__file__).parents[2]
  digest = hashlib.sha256()
  for package in PACKAGES:
    for path in sorted((root / package).rglob('*.py')):
      digest.update(f'{path.relative_to(root)}\0'.encode())
      digest.update(hashlib.sha256(path.read_bytes()).digest())
  return digest.hexdigest()[:16]
