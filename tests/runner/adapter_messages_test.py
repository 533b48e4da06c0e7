# SPDX-License-Identifier: Apache-2.0
"""What the first host tells the others of adapters, in messages of integers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sarathi_jax.runner import adapters


class Into:
  """Notes what is put into slots."""

  def __init__(self) -> None:
    self.put_in: list[tuple[int, Any]] = []

  def put(self, slot: int, matrices: Any) -> None:
    self.put_in.append((slot, matrices))


def draw(seed: int, num: int) -> adapters.Matrices:
  rng = np.random.default_rng(seed)
  return {
    f'layers.{i}.attn.q': (
      rng.normal(size=(5, 1 + i)).astype(np.float32),
      rng.normal(size=(1 + i, 7)).astype(np.float32),
    )
    for i in range(num)
  }


@pytest.mark.parametrize('most', [1, 20, 1 << 24])
def test_what_is_told_is_put_there(most, monkeypatch) -> None:
  """Of any size, one after another, none with what another left."""
  monkeypatch.setattr(adapters, '_MESSAGE_NUMBERS', most)
  into: Any = Into()
  received = adapters.Received()
  told = [draw(0, 3), draw(1, 0), draw(2, 2)]
  for slot, adapter in enumerate(told):
    messages = list(adapters.messages(slot, adapter))
    if most == 1:
      assert len(messages) == max(1, len(adapter))
    for message in messages:
      assert message.dtype == np.int32
      received.take(np.frombuffer(message.tobytes(), np.int32), into)
  assert [slot for slot, _ in into.put_in] == [0, 1, 2]
  for adapter, (_, got) in zip(told, into.put_in, strict=True):
    assert got.keys() == adapter.keys()
    for name, pair in adapter.items():
      for ours, theirs in zip(pair, got[name], strict=True):
        np.testing.assert_array_equal(ours, theirs)
