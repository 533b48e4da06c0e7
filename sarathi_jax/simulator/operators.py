# SPDX-License-Identifier: Apache-2.0
"""Predicts how long one operator takes on one device, from its shape alone.

Floating-point numbers or NumPy arrays in, seconds out. The few constants here
hold for all devices; what differs between them is `hardware.Hardware`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pallas_kernels import attention_work
from sarathi_jax.simulator import hardware as hardware_lib

Number = Any  # a float, or an array of them
BYTES = 2  # of a weight, an activation, a key or a value

# A thread block's tile, (tokens, features), and in how many parts the sum may
# be split to give every processor something to do.
_TILES = ((64, 128), (64, 256), (128, 128), (128, 256))
_SPLITS = (1, 2, 4)
# Small tiles reuse less of what they load.
_SMALL_TILE = 0.95
# The last wave of tiles is rarely waited for whole: blocks end at various
# times.
_WAVE = 0.1
# A chunk attends to itself at about this much of a full square's cost, though
# half of it is masked: FlashAttention-2's blocks on the diagonal, and the
# unequal lengths of what its thread blocks have to do.
_DIAGONAL = 1.375
_ROWS = 128  # of queries, a thread block of attention


def matmul(
  hardware: hardware_lib.Hardware, n: Number, k: Number, m: Number
) -> Number:
  """Predicts [n, k] x [k, m], n tokens: a roofline with tile quantisation.

  Where memory and arithmetic take about as long, both are felt: their times add
  as the sides of a right angle.
  """
  fit = hardware.efficiencies
  rate = hardware.memory_rate * fit.memory
  of_sm = hardware.flops * fit.gemm / hardware.num_sms
  best: Number = np.inf
  for rows, cols in _TILES:
    eff = 1.0 if rows == 128 else _SMALL_TILE
    for split in _SPLITS:
      q = np.ceil(n / rows) * np.ceil(m / cols) * split / hardware.num_sms
      waves = np.maximum(1, q + _WAVE * (np.ceil(q) - q))
      seconds = waves * 2 * rows * cols * k / split / (of_sm * eff)
      if split > 1:  # Partial sums are written as float32 and added.
        seconds = seconds + 2 * n * m * 4 * split / rate
      best = np.minimum(best, seconds)
  moved = BYTES * (k * m + n * k + n * m) / rate
  return fit.kernel_s + np.hypot(moved, best)


def elementwise(hardware: hardware_lib.Hardware, num_bytes: Number) -> Number:
  """Predicts reading and writing so many bytes, together.

  It is as fast as memory, or as the processors can ask for it: on devices with
  fast memory the processors are slower.
  """
  fit = hardware.efficiencies
  rate = min(
    hardware.memory_rate * fit.memory,
    hardware.num_sms * hardware.clock_hz * fit.elementwise,
  )
  return np.hypot(fit.kernel_s, num_bytes / rate)


def decode_attention(
  hardware: hardware_lib.Hardware, kv_tokens: Number, token_bytes: Number
) -> Number:
  """Predicts a layer's attention of decodes of `kv_tokens` contexts, summed.

  `attention_s`, which is per call, is not included.

  Args:
    hardware: what it runs on.
    kv_tokens: the sum of the decodes' contexts.
    token_bytes: bytes of a token's keys and values.
  """
  return (
    kv_tokens
    * token_bytes
    / (hardware.memory_rate * hardware.efficiencies.decode_attention)
  )


def prefill_attention(
  hardware: hardware_lib.Hardware,
  tokens: Number,
  before: Number,
  num_heads: int,
  head_dim: int,
) -> Number:
  """Predicts a layer's attention of a chunk with `before` tokens in the cache.

  `attention_s`, which is per call, is not included.
  """
  rows = -(-tokens // _ROWS) * _ROWS
  flops = (
    rows
    * (before + _DIAGONAL * rows)
    * attention_work.pair_flops(num_heads, head_dim)
  )
  return flops / (hardware.flops * hardware.efficiencies.prefill_attention)


def all_reduce(
  hardware: hardware_lib.Hardware, num_bytes: Number, workers: Number, link: str
) -> Number:
  """Predicts a ring among `workers` devices, as slow as its slowest link."""
  least = hardware.efficiencies.collective_s
  if link == 'network':
    least = np.maximum(least, 2 * (workers - 1) * hardware.message_s)
  return least + (
    num_bytes * 2 * (workers - 1) / workers / hardware.link_rate(link)
  )


def send(
  hardware: hardware_lib.Hardware, num_bytes: Number, link: str
) -> Number:
  """Predicts sending bytes from one device to another."""
  least = hardware.efficiencies.kernel_s
  if link == 'network':
    least = least + hardware.message_s
  return least + num_bytes / hardware.link_rate(link)
