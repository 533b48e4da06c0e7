# SPDX-License-Identifier: Apache-2.0
"""Groups of layers: no two share a page, and few bytes are lost."""

from __future__ import annotations

import itertools
from typing import Any

import hypothesis
from hypothesis import strategies as st
import pytest

from sarathi_jax import page_groups
from sarathi_jax.models import config as config_lib
from sarathi_jax.models import layer_groups
from sarathi_jax.models import parallel
from sarathi_jax.models import published

PAGE_SIZE = 64


def make_model(num_layers: int, **fields: Any) -> config_lib.ModelConfig:
  return config_lib.LlamaConfig(
    **dict(
      vocab_size=512,
      hidden_size=64,
      intermediate_size=64,
      num_layers=num_layers,
      num_heads=4,
      num_kv_heads=2,
      head_dim=16,
      max_position_embeddings=131072,
    )
    | fields
  )


MODELS = {
  name: published.MODELS[name]
  for name in ('gemma-3-27b', 'gpt-oss-20b', 'olmo-3-32b')
}


def check(
  model: config_lib.ModelConfig, pp: int, max_model_len: int
) -> layer_groups.LayerGroups:
  parallelism = parallel.Parallelism(pp=pp)
  groups = layer_groups.of(
    model, parallelism, max_model_len=max_model_len, page_size=PAGE_SIZE
  )
  num_layers = parallelism.num_layers(model)
  assert len(groups.arrays) == len(groups.groups) == num_layers
  assert {*groups.arrays} == {*range(groups.num_arrays)}
  for stage in range(pp):
    places = [
      (array, at[stage])
      for array, at in zip(groups.arrays, groups.groups, strict=True)
    ]
    assert len({*places}) == num_layers, 'layers share pages'
    for i, (_, group) in enumerate(places):
      layer = parallelism.layers_of(model, i)[stage]
      window = model.layer_window(layer or 0) or max_model_len
      kept = groups.windows[group] or max_model_len
      assert kept >= min(window, max_model_len), 'too little is kept'
  widths = [window or max_model_len for window in groups.windows]
  assert widths == sorted(widths, reverse=True)
  return groups


@hypothesis.given(
  num_layers=st.integers(1, 30),
  window=st.integers(1, 5000),
  which=st.integers(1, 2**30),
  pp=st.integers(1, 4),
  max_model_len=st.integers(1, 8000),
)
@hypothesis.settings(max_examples=60, deadline=None)
def test_no_two_layers_share_a_page(
  num_layers: int, window: int, which: int, pp: int, max_model_len: int
) -> None:
  layers = tuple(i for i in range(num_layers) if which >> i & 1)
  model = make_model(
    num_layers, sliding_window=window, window_layers=layers or None
  )
  groups = check(model, min(pp, num_layers), max_model_len)
  # Never more than if there were no windows.
  assert page_groups.num_pages(
    groups.windows, max_model_len, PAGE_SIZE
  ) * groups.num_arrays <= -(-max_model_len // PAGE_SIZE) * len(groups.arrays)


@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('pp', [1, 2, 4])
def test_few_bytes_are_lost(name: str, pp: int) -> None:
  model, context = MODELS[name], 32768
  groups = check(model, pp, context)
  parallelism = parallel.Parallelism(pp=pp)
  stages = itertools.zip_longest(
    *(
      parallelism.layers_of(model, i)
      for i in range(parallelism.num_layers(model))
    )
  )
  least = max(
    sum(
      min(context, model.layer_window(layer) or context)
      for layer in stage
      if layer is not None
    )
    for stage in stages
  )
  pages = page_groups.num_pages(groups.windows, context, PAGE_SIZE)
  assert pages * PAGE_SIZE * groups.num_arrays <= 1.04 * least


@pytest.mark.parametrize(
  ('fields', 'windows'),
  [
    ({}, (None,)),
    ({'sliding_window': 4096}, (4096,)),
    ({'sliding_window': 8192}, (None,)),
    ({'sliding_window': 8192, 'window_layers': (1, 3)}, (None,)),
    # What is gained is not worth another table.
    ({'sliding_window': 8000, 'window_layers': (1, 3)}, (None,)),
  ],
)
def test_layers_of_one_kind_are_one_group(
  fields: dict[str, Any], windows: page_groups.Windows
) -> None:
  groups = check(make_model(4, **fields), 1, 8192)
  assert groups == layer_groups.LayerGroups(
    windows, (0, 1, 2, 3), ((0,), (0,), (0,), (0,))
  )


def test_the_example() -> None:
  model = make_model(6, sliding_window=64, window_layers=(0, 1, 3, 4))
  groups = check(model, 1, 32768)
  assert groups.windows == (None, 64, 64)
  assert groups.num_arrays == 2
