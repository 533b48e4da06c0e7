# SPDX-License-Identifier: Apache-2.0
"""Counts what any attention has to read and to compute. No JAX."""

from __future__ import annotations

from collections.abc import Mapping

# dtype of keys and values -> bytes of a number.
NUMBER_BYTES: Mapping[str, int] = {
  'float32': 4,
  'bfloat16': 2,
  'float16': 2,
  'int8': 1,
  'float8_e4m3fn': 1,
}
# Bytes of the scale of each token and head, where they are quantized.
_SCALE_BYTES = 4


def token_bytes(num_kv_heads: int, head_dim: int, kv_dtype: str) -> int:
  """Returns the bytes of one token's keys and values in one layer."""
  number = NUMBER_BYTES[kv_dtype]
  scale = _SCALE_BYTES if number == 1 else 0
  return 2 * num_kv_heads * (head_dim * number + scale)


def pair_flops(num_heads: int, head_dim: int) -> int:
  """Returns the operations of a query with a key: its score, and its value."""
  return 4 * num_heads * head_dim


def num_pairs(before: int, tokens: int, window: int | None = None) -> int:
  """Returns the pairs of query and key that causality leaves.

  Args:
    before: tokens of the sequence that have keys already.
    tokens: queries, which have keys, too.
    window: keys that a query sees at most, its own counted in; None for all.

  Worked example: before=3, tokens=2 -> 4 + 5.
  """
  if window is None:
    return tokens * before + tokens * (tokens + 1) // 2
  return sum(min(at + 1, window) for at in range(before, before + tokens))


def num_keys(before: int, tokens: int, window: int | None = None) -> int:
  """Returns the number of keys that any query sees; see `num_pairs`."""
  if window is None or not tokens:
    return before + tokens if tokens else 0
  return min(before + tokens, window + tokens - 1)
