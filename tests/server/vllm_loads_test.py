# SPDX-License-Identifier: Apache-2.0
"""What routers are told of the engine's load."""

from __future__ import annotations

from typing import Any

import pytest

from sarathi_jax.server.protocols import vllm_loads


def test_the_rate_is_what_work_drains_at(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  now = [0.0]
  monkeypatch.setattr(vllm_loads.time, 'monotonic', lambda: now[0])
  frontend: Any = None
  loads = vllm_loads.Loads(frontend)

  def after(seconds: float, num_generated: int) -> float:
    now[0] += seconds
    return loads._measure(num_generated)

  assert after(0.5, 400) == 0  # Too soon to say.
  assert after(0.5, 1000) == 1000
  assert after(0.9, 1001) == 1000
  # With little or nothing to do it is as quick as before, or nearly.
  assert after(0.1, 1002) == pytest.approx(1000 * 0.5 ** (1 / 60))
  assert after(59, 1002) == pytest.approx(500)
  assert after(1, 3002) == 2000
