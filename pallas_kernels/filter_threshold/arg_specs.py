# SPDX-License-Identifier: Apache-2.0
"""Rows of logits as data, for tests, the compiler and measurements."""

from __future__ import annotations

import dataclasses

import numpy as np

# What logits are like: of a model that knows, and of one that doesn't; many of
# them equal; most of them ruled out.
KINDS = 'normal', 'flat', 'grid', 'ruled out'
# Rows and tokens, as steps have them: of vocabularies that a sketch holds, and
# that none does, one of them with rows that begin anywhere.
SHAPES = (64, 32000), (256, 152064), (64, 50257)


@dataclasses.dataclass(frozen=True, slots=True)
class ArgSpec:
  """Rows, from which `make` draws the arguments of the operation.

  Attributes:
    kind: of the logits, one of `KINDS`.
    num_rows: S.
    vocab_size: V.
  """

  kind: str
  num_rows: int
  vocab_size: int


def make(
  spec: ArgSpec, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Draws the arguments of `api.least_kept`, with each filter in most rows."""
  rng = np.random.default_rng(seed)
  rows, vocab_size = spec.num_rows, spec.vocab_size
  x = rng.normal(0, 0.1 if spec.kind == 'flat' else 3, (rows, vocab_size))
  if spec.kind == 'grid':
    x = np.round(4 * x) / 4
  if spec.kind == 'ruled out':
    x[rng.random(x.shape) < 0.7] = -np.inf
  x -= x.max(axis=-1, keepdims=True)
  few = rng.integers(1, 50, rows)
  top_k = np.where(
    rng.random(rows) < 0.5, few, rng.integers(0, vocab_size + 4, rows)
  )
  top_k[rng.random(rows) < 0.3] = 0
  top_p = np.where(rng.random(rows) < 0.3, 1, rng.random(rows))
  return x.astype(np.float32), top_k.astype(np.int32), top_p.astype(np.float32)
