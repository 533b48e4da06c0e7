# SPDX-License-Identifier: Apache-2.0
"""Divides layers into groups that share page tables. Arithmetic only; no JAX.

Layers with windows need their window's pages only. So that all groups can take
pages of one pool, a page has the same bytes in all: a group is at most one
layer of each of a stage's *arrays* of pages, and layers of several groups keep
their keys and values in one array, in pages of their own.

Worked example, layers of windows W W F W W F, in two arrays:

  array 0:  W0 W1 F       groups: F, W, W; a page is two layers' keys and
  array 1:  W0 F  W1      values, and a sequence has a table for each group
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
import dataclasses
import functools
import itertools

from sarathi_jax import page_groups
from sarathi_jax.models import config as config_lib
from sarathi_jax.models import parallel

# The part of the pages that may be lost for fewer groups, each of which has a
# page table that is sent with every step.
_LOSS = 0.03
_MOST_GROUPS = 8


@dataclasses.dataclass(frozen=True, slots=True)
class LayerGroups:
  """The groups of a model's layers.

  Attributes:
    windows: of each group; the widest first.
    arrays: of each layer of a stage, the number of the array that has its
      pages.
    groups: of each layer of a stage, its group at each stage.
  """

  windows: page_groups.Windows
  arrays: tuple[int, ...]
  groups: tuple[tuple[int, ...], ...]

  @property
  def num_arrays(self) -> int:
    return max(self.arrays) + 1


@functools.cache
def of(
  model: config_lib.ModelConfig,
  parallelism: parallel.Parallelism,
  *,
  max_model_len: int,
  page_size: int,
  keep_all: bool = False,
) -> LayerGroups:
  """Returns the groups with which sequences take the fewest bytes, or nearly.

  Args:
    model: the model.
    parallelism: how devices share it.
    max_model_len: the most tokens of a sequence; no wider window matters.
    page_size: tokens in a page.
    keep_all: whether to keep what lies before windows, too.
  """
  layers = [
    [
      None
      if keep_all
      else _window(model.layer_window(layer or 0), max_model_len)
      for layer in parallelism.layers_of(model, i)
    ]
    for i in range(parallelism.num_layers(model))
  ]
  windows = sorted(set(itertools.chain(*layers)), key=_width, reverse=True)
  pages = {
    window: page_groups.num_pages((window,), max_model_len, page_size)
    for window in windows
  }
  one = [[windows[0]] * len(stages) for stages in layers]  # as if all were wide
  tries = [_divide(one, pages, len(layers))]
  if len(windows) > 1:
    counts = [
      max(stage.count(window) for stage in zip(*layers, strict=True))
      for window in windows
    ]
    sizes = {-(-c // n) for c in counts for n in range(1, _MOST_GROUPS + 1)}
    tries += [
      plan
      for n in sorted(sizes | {len(layers)})
      if len((plan := _divide(layers, pages, n)).windows) <= _MOST_GROUPS
    ]
  costs = [
    plan.num_arrays * sum(pages[window] for window in plan.windows)
    for plan in tries
  ]
  _, _, best = min(
    (len(plan.windows), cost, i)
    for i, (plan, cost) in enumerate(zip(tries, costs, strict=True))
    if cost <= (1 + _LOSS) * min(costs)
  )
  return tries[best]


def _divide(
  layers: Sequence[Sequence[int | None]],
  pages: Mapping[int | None, int],
  num_arrays: int,
) -> LayerGroups:
  """Divides layers among arrays, each to where it adds the fewest pages.

  Args:
    layers: of each layer of a stage, its window at each stage.
    pages: by window, the widest first, what a group of it takes.
    num_arrays: of pages; at most as many as layers.
  """
  num_stages = len(layers[0])
  # (array, stage, window) -> the layers there; window -> the most of them.
  there: Counter[tuple[int, int, int | None]] = Counter()
  most: Counter[int | None] = Counter()
  load: Counter[int] = Counter()
  arrays, ordinals = [], []
  for windows in layers:

    def added(array: int, windows: Sequence[int | None] = windows) -> int:
      return sum(
        pages[window]
        for window in set(windows)
        if any(
          there[array, stage, window] == most[window]
          for stage in range(num_stages)
          if windows[stage] == window
        )
      )

    array = min(range(num_arrays), key=lambda a: (added(a), load[a], a))
    load[array] += 1
    arrays.append(array)
    ordinals.append([there[array, s, w] for s, w in enumerate(windows)])
    for stage, window in enumerate(windows):
      there[array, stage, window] += 1
      most[window] = max(most[window], there[array, stage, window])
  first = {
    window: sum(most[wider] for wider in list(pages)[:i])
    for i, window in enumerate(pages)
  }
  return LayerGroups(
    tuple(window for window in pages for _ in range(most[window])),
    tuple(arrays),
    tuple(
      tuple(first[window] + n for window, n in zip(windows, at, strict=True))
      for windows, at in zip(layers, ordinals, strict=True)
    ),
  )


def _width(window: int | None) -> float:
  return float('inf') if window is None else window


def _window(window: int | None, max_model_len: int) -> int | None:
  return None if window is None or window >= max_model_len else window
