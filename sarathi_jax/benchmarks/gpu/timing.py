# SPDX-License-Identifier: Apache-2.0
"""Times functions on a device, and measures what the device can do."""

from __future__ import annotations

from collections.abc import Callable
import functools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp


def seconds(
  run: Callable[[], Any], repeats: int = 7, at_least: float = 0.02
) -> float:
  """Returns the median seconds of a call whose result is waited for.

  Args:
    run: returns arrays.
    repeats: number of measurements.
    at_least: seconds that a measurement takes; calls are queued to fill them,
      so that launching hardly counts.
  """
  jax.block_until_ready(run())
  start = time.perf_counter()
  jax.block_until_ready(run())
  calls = max(1, round(at_least / max(time.perf_counter() - start, 1e-6)))
  times = []
  for _ in range(repeats):
    start = time.perf_counter()
    for _ in range(calls):
      out = run()
    jax.block_until_ready(out)
    times.append((time.perf_counter() - start) / calls)
  return statistics.median(times)


def copy_bandwidth(num_bytes: int) -> float:
  """Measures bytes a second, read and written, of a copy in device memory."""
  x = jnp.zeros(num_bytes // 4, jnp.float32)
  return 2 * x.nbytes / seconds(functools.partial(jax.jit(lambda x: x + 1), x))


def matmul_rate(n: int) -> float:
  """Measures operations a second of a product of [n, n] bfloat16 matrices."""
  a, b = (
    jax.random.normal(jax.random.key(i), (n, n), jnp.float32).astype('bfloat16')
    for i in range(2)
  )
  return 2 * n**3 / seconds(functools.partial(jax.jit(jnp.matmul), a, b))


def limits(num_bytes: int, n: int) -> dict[str, float]:
  """Measures the limits that results on this device are compared with."""
  return {
    'copy_bytes_per_s': copy_bandwidth(num_bytes),
    'matmul_flops_per_s': matmul_rate(n),
  }
