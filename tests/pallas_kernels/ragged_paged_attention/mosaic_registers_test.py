# SPDX-License-Identifier: Apache-2.0
"""What Mosaic's kernels take for granted of how registers are laid out.

Only a GPU could run what they do to registers; that it is right follows from
the layouts.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mosaic_rows

pytestmark = pytest.mark.skipif(
  jax.__version_info__ < (0, 12), reason='needs JAX 0.12'
)
LANES, WARPS = 32, 4


def held(layout: Any, shape: tuple[int, ...]) -> np.ndarray:
  """What each thread holds: [WARPS, LANES, registers, numbers of each].

  Numbers stand for their place in an array of this shape.
  """
  numbers = np.arange(np.prod(shape)).reshape(shape)
  for tile in layout.tiling.tiles:
    first = numbers.ndim - len(tile)
    split = [
      n
      for size, t in zip(numbers.shape[first:], tile, strict=True)
      for n in (size // t, t)
    ]
    numbers = numbers.reshape(*numbers.shape[:first], *split)
    axes = range(first, numbers.ndim)
    numbers = numbers.transpose(*range(first), *axes[::2], *axes[1::2])
  # From the right, as the layout counts its axes: a number's, then the rest.
  places = (*layout.warp_dims, *layout.lane_dims)
  threads = [d for d in places if isinstance(d, int)]
  rest = [
    d
    for d in range(-numbers.ndim, 0)
    if d not in threads and d != layout.vector_dim
  ]
  numbers = numbers.transpose(*threads, *rest, layout.vector_dim)
  sizes = iter(numbers.shape[: len(threads)])
  # Axes that repeat a thread's numbers.
  given, full = [], []
  for d in places:
    given.append(next(sizes) if isinstance(d, int) else 1)
    full.append(given[-1] if isinstance(d, int) else d.times)
  end = numbers.shape[len(threads) :]
  numbers = np.broadcast_to(numbers.reshape(*given, *end), (*full, *end))
  return numbers.reshape(WARPS, LANES, -1, layout.vector_length)


def of(layout: Any) -> Any:
  return layout.to_mgpu()


@pytest.mark.parametrize('columns', [16, 32, 64, 128])
@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_weights_are_left_operands_as_they_lie(columns: int, dtype: str):
  shape = mosaic_rows.ROWS, columns
  np.testing.assert_array_equal(
    held(of(mosaic_rows.plgpu.Layout.WGMMA), shape),
    held(of(mosaic_rows.mma_layout('LHS', dtype)), shape),
  )


def test_mmas_results_lie_as_wgmmas_do():
  layout = mosaic_rows.plgpu.Layout.MMA_ACC(jnp.dtype('bfloat16'))
  assert of(layout) == of(mosaic_rows.plgpu.Layout.WGMMA)


@pytest.mark.parametrize(
  'layout',
  [
    lambda: mosaic_rows.plgpu.Layout.WGMMA,
    lambda: mosaic_rows.mma_layout('LHS', 'bfloat16'),
  ],
)
def test_registers_are_of_two_rows_in_turn(layout: Any):
  """As `_pointers` counts them, and as a row's own numbers are held."""
  shape = mosaic_rows.ROWS, 64
  rows = held(of(layout()), shape) // shape[1]
  of_rows = of(mosaic_rows.plgpu.Layout.WGMMA.reduce(1))
  mine = held(of_rows, shape[:1])[..., 0]
  assert mine.shape[-1] == 2
  for register in range(rows.shape[2]):
    for number in range(rows.shape[3]):
      np.testing.assert_array_equal(
        rows[:, :, register, number], mine[:, :, register % 2]
      )
