# SPDX-License-Identifier: Apache-2.0
"""Page tables of groups of layers, as steps are sent them."""

from __future__ import annotations

import hypothesis
from hypothesis import strategies as st
import numpy as np

from sarathi_jax.models import layer_groups
from sarathi_jax.models import parallel
from sarathi_jax.models import published
from sarathi_jax.runner import page_tables


@hypothesis.given(
  windows=st.lists(st.none() | st.integers(1, 60), min_size=1, max_size=3).map(
    tuple
  ),
  page_size=st.integers(1, 9),
  places=st.integers(1, 12),
  data=st.data(),
)
@hypothesis.settings(deadline=None, max_examples=100)
def test_all_that_a_window_sees_is_sent(windows, page_size, places, data):
  num_tokens = data.draw(st.integers(1, places * page_size))
  tables = page_tables.PageTables(windows, page_size, places, num_tokens)
  starts = data.draw(
    st.lists(
      st.integers(0, places * page_size - num_tokens), min_size=1, max_size=4
    )
  )
  whole = np.arange(5 * len(windows) * places).reshape(5, len(windows), places)
  slots = np.arange(len(starts))[::-1]
  sent = np.empty((len(starts), tables.size), int)
  tables.write(whole, slots, np.array(starts), sent)
  for group, (window, table) in enumerate(
    zip(windows, tables.split(sent), strict=True)
  ):
    first = tables.first_places(window, np.array(starts))
    for row, start in enumerate(starts):
      seen = range(
        0 if window is None else max(start - window + 1, 0), start + num_tokens
      )
      for place in {position // page_size for position in seen}:
        assert table[row, place - first[row]] == whole[slots[row], group, place]


def test_windows_need_few_bytes():
  """Of Gemma-3-27B, 64 sequences of 128k tokens, as decodes."""
  groups = layer_groups.of(
    published.MODELS['gemma-3-27b'],
    parallel.Parallelism(),
    max_model_len=131072,
    page_size=64,
  )
  tables = page_tables.PageTables(groups.windows, 64, 2048, 64)
  whole = page_tables.PageTables((None,) * len(groups.windows), 64, 2048, 64)
  assert len(groups.windows) > 4
  assert tables.size < 1.1 * 2048 * groups.windows.count(None)
  assert whole.size == 2048 * len(groups.windows)
