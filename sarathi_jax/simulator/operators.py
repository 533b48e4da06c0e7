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
# Attention's thread blocks: each has so many queries of one head, and so many
# run on a processor at once.
_QUERIES = 64
_RESIDENT = 2
# Their last wave is waited for nearly whole, as all take as long.
_LAST_WAVE = 0.8
# Where they are fewer than this of the processors, each one's keys are split
# among several, whose partial sums are then added.
_FEW = 0.8
_SPLIT = 1.3
# A token attends to half of its chunk, itself included.
_OWN = 0.5
# `appending` of FlashAttention-2's kernel of paged caches, by Vidur's table of
# it (A100, 32 heads): a chunk of 4,096 tokens takes 3.4 times what its causal
# half does.
APPENDING = 1.19


def matmul(
  hardware: hardware_lib.Hardware,
  n: Number,
  k: Number,
  m: Number,
  weight_bytes: float = BYTES,
  flops: float | None = None,
) -> Number:
  """Predicts [n, k] x [k, m], n tokens: a roofline with tile quantisation.

  Where memory and arithmetic take about as long, both are felt: their times add
  as the sides of a right angle. A weight is read in `weight_bytes`, as a kernel
  does that takes codes apart. Arithmetic is that of 16 bits, or what reaches
  the same part of `flops` a second.
  """
  fit = hardware.efficiencies
  rate = hardware.memory_rate * fit.memory
  of_sm = (flops or hardware.flops) * fit.gemm / hardware.num_sms
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
  moved = (weight_bytes * k * m + BYTES * (n * k + n * m)) / rate
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
  appending: float = 0.0,
) -> Number:
  """Predicts a layer's attention of a chunk with `before` tokens in the cache.

  Its thread blocks run in waves: a chunk of few blocks more than a wave takes
  nearly two. `attention_s`, which is per call, is not included.

  Args:
    hardware: what it runs on.
    tokens, before: the chunk's tokens, and those before it.
    num_heads, head_dim: of the device's queries.
    appending: what it costs that each block writes its chunk's keys and values
      to the cache, as if a token attended to this many times the chunk more.
  """
  blocks = np.ceil(tokens / _QUERIES) * num_heads
  slots = _RESIDENT * hardware.num_sms
  full = blocks / slots
  waves = np.maximum(1, full + _LAST_WAVE * (np.ceil(full) - full))
  waves = np.where(blocks < _FEW * hardware.num_sms, full * _SPLIT, waves)
  flops = (
    waves
    * slots
    * _QUERIES
    * (before + (_OWN + appending) * tokens)
    * attention_work.pair_flops(1, head_dim)
  )
  return flops / (hardware.flops * hardware.efficiencies.prefill_attention)


def all_reduce(
  hardware: hardware_lib.Hardware, num_bytes: Number, workers: Number, link: str
) -> Number:
  """Predicts rings among `workers` devices, as slow as their slowest link."""
  least = hardware.efficiencies.collective_s
  if link == 'network':
    least = np.maximum(least, 2 * (workers - 1) * hardware.message_s)
  return least + (
    num_bytes * 2 * (workers - 1) / workers / hardware.ring_rate(link)
  )


def send(
  hardware: hardware_lib.Hardware, num_bytes: Number, link: str
) -> Number:
  """Predicts sending bytes from one device to another."""
  least = hardware.efficiencies.kernel_s
  if link == 'network':
    least = least + hardware.message_s
  return least + num_bytes / hardware.link_rate(link)
