# SPDX-License-Identifier: Apache-2.0
"""The plan: each row once, in few tiles; and what a GPU has to do by it."""

from __future__ import annotations

import collections
from collections.abc import Iterator
import functools
import itertools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import gpu_targets
from pallas_kernels.grouped_matmul import arg_specs
from pallas_kernels.grouped_matmul import plan as plan_lib
from pallas_kernels.grouped_matmul import tuning

SIZES = [
  [3, 0, 1],
  [0, 0, 0],
  [0, 0, 17],
  [16, 16, 16],
  [1] * 40,
  np.random.default_rng(0).integers(0, 70, 128).tolist(),
]


@functools.cache
def _items(num_groups: int, tile_rows: int, num_columns: int) -> Any:
  return jax.jit(
    jax.vmap(
      lambda i, sizes: plan_lib.item_of(i, sizes, tile_rows, num_columns),
      in_axes=(0, None),
    )
  )


def items_of(
  sizes: np.ndarray, num_rows: int, tile_rows: int, num_columns: int
) -> list[plan_lib.Item]:
  """All work items, in their order."""
  num = plan_lib.most_tiles(num_rows, len(sizes), tile_rows) * num_columns
  compiled_for = 1 << num.bit_length()  # more, so that it is for few numbers
  items = _items(len(sizes), tile_rows, num_columns)(
    jnp.arange(compiled_for, dtype=jnp.int32), jnp.asarray(sizes, jnp.int32)
  )
  return [plan_lib.Item(*one) for one in np.stack(items, axis=1)[:num].tolist()]


@pytest.mark.parametrize('sizes', SIZES, ids=str)
@pytest.mark.parametrize('tile_rows', [1, 2, 16, 64])
@pytest.mark.parametrize('more', [0, 5, 300])
def test_each_row_meets_each_column_once(sizes, tile_rows, more):
  num_columns = 3
  total = sum(sizes)
  items = items_of(np.asarray(sizes), total + more, tile_rows, num_columns)
  got = np.full((total, num_columns), -1)
  for group, start, stop, column in items:
    assert 0 <= start <= stop <= min(start + tile_rows, total)
    assert 0 <= column < num_columns
    assert (got[start:stop, column] == -1).all()
    got[start:stop, column] = group
  expected = np.repeat(np.arange(len(sizes)), sizes)
  np.testing.assert_array_equal(got, np.stack([expected] * num_columns, axis=1))
  used = [item for item in items if item.start < item.stop]
  assert items[: len(used)] == used
  assert len(used) == num_columns * sum(-(-size // tile_rows) for size in sizes)
  # Of a group and its columns, one after the other.
  pairs = [(item.group, item.column) for item in used]
  assert len(list(itertools.groupby(pairs))) == len(set(pairs))


def test_there_are_just_enough_tiles():
  for groups, rows, size in itertools.product(
    (1, 3, 8), range(1, 20), (1, 4, 16)
  ):
    # As many groups as can be with one row, and one with all others.
    used = min(groups, rows)
    sizes = np.zeros(groups, np.int32)
    sizes[:used] = 1
    sizes[0] += rows - used
    items = items_of(sizes, rows, size, 1)
    assert all(item.start < item.stop for item in items)


class Work(NamedTuple):
  """What a GPU does, or has to.

  Attributes:
    bytes: that its memory gives and takes.
    flops: operations of its tensor cores.
    useful: of them, those of rows that there are.
  """

  bytes: int
  flops: int
  useful: int

  def __add__(self, other: Any) -> Work:
    return Work(*map(operator.add, self, other))

  def seconds(self, target: gpu_targets.GpuTarget) -> float:
    return max(self.bytes / target.bandwidth, self.flops / target.matmul_flops)


def work_of(
  keys: np.ndarray,
  shape: tuning.Shape,
  target: gpu_targets.GpuTarget,
  name: str,
) -> tuple[Work, Work]:
  """What the kernel does, padding counted, and the least there is to do.

  What was read stays in a cache of the device's size until that is full, the
  oldest first. The least operations are those of tensor cores, which multiply a
  matrix by 16 rows at a time.
  """
  sizes = next(
    sizes
    for most, sizes in tuning._HALF[name]
    if shape.num_rows <= most * shape.num_groups
  ).for_shape(shape)
  group_sizes = np.bincount(keys.ravel(), minlength=shape.num_groups)
  order = np.argsort(keys.ravel(), kind='stable')
  # In the first launch rows are tokens; in the second, what was made of them.
  rows = (
    order // keys.shape[1] if shape.num_kinds == 2 else np.arange(len(order))
  )
  items = items_of(
    group_sizes, shape.num_rows, sizes.rows, shape.num_out // sizes.columns
  )
  number = shape.itemsize

  def pieces() -> Iterator[tuple[Any, int]]:
    for group, start, stop, column in items:
      if start < stop:
        yield (
          ('matrix', group, column),
          shape.num_kinds * shape.num_in * sizes.columns * number,
        )
      for place in range(start, stop):
        yield ('row', rows[place]), shape.num_in * number
        yield ('out', place, column), sizes.columns * number

  cache = collections.OrderedDict[Any, int]()
  moved = held = 0
  for piece, size in pieces():
    if piece not in cache:
      moved += size
      held += size
      cache[piece] = size
    cache.move_to_end(piece)
    while held > target.l2_bytes and len(cache) > 1:
      held -= cache.popitem(last=False)[1]
  matrix = shape.num_kinds * shape.num_in * shape.num_out
  read = len(np.unique(rows)) * shape.num_in
  written = shape.num_rows * shape.num_out
  used = (group_sizes > 0).sum()
  # Of each column of a tile, the rows that its way has.
  computed = sum(
    sum(sizes.way(stop - start)) for _, start, stop, _ in items if start < stop
  )
  of_column = 2 * shape.num_kinds * shape.num_in * sizes.columns
  fewest = (-(-group_sizes // 16) * 16).sum()
  useful = 2 * shape.num_rows * matrix
  return (
    Work(moved, computed * of_column, useful),
    Work(
      (used * matrix + read + written) * number, 2 * fewest * matrix, useful
    ),
  )


@pytest.mark.parametrize('name', gpu_targets.TARGETS)
@pytest.mark.parametrize('routing', arg_specs.ROUTINGS)
@pytest.mark.parametrize('num_tokens', [1, 16, 64, 512])
def test_a_gpu_has_little_more_to_do_than_it_must(name, routing, num_tokens):
  """Of the experts of Qwen3-30B-A3B, in both launches together."""
  target = gpu_targets.TARGETS[name]
  groups, chosen, width, inner = arg_specs.MODELS['qwen3-30b-a3b']
  keys = arg_specs.choose(
    arg_specs.ArgSpec(num_tokens, groups, chosen, routing=routing)
  )
  done = least = Work(0, 0, 0)
  for kinds, num_in, num_out in ((2, width, inner), (1, inner, width)):
    shape = tuning.Shape('bfloat16', keys.size, groups, num_in, num_out, kinds)
    works = work_of(keys, shape, target, name)
    done, least = done + works[0], least + works[1]
  print(
    f'bytes {done.bytes / least.bytes:.3f}, operations '
    f'{done.flops / least.flops:.3f} of the least; of those of the rows that '
    f'there are {done.flops / done.useful:.2f}'
  )
  assert least.bytes <= done.bytes <= 1.1 * least.bytes
  assert least.flops <= done.flops <= 1.1 * least.flops
  assert done.seconds(target) <= 1.1 * least.seconds(target)


@pytest.mark.parametrize('name', gpu_targets.TARGETS)
def test_a_tile_has_a_way_for_each_number_of_rows(name):
  """Of which the fewest that has room is taken, and the last is the tile."""
  for _, sizes in tuning._HALF[name]:
    computed = [sum(sizes.way(1 + num)) for num in range(sizes.rows)]
    assert computed == sorted(computed)
    assert all(num < most for num, most in enumerate(computed))
    assert computed[-1] == sizes.rows
