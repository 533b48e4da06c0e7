# SPDX-License-Identifier: Apache-2.0
"""When steps ended, how long those of a size take, and when to launch one."""

from __future__ import annotations

from collections import deque

# When to launch behind a batch that computes: this fraction of its time before
# its end, and so many seconds, in which the host makes the next one.
_AHEAD, _AHEAD_S = 0.2, 5e-3
# The most by which the expected time of a step grows at once: it is to be on
# the short side, as a device that waits is worse than an early plan.
_GROWTH, _GROWTH_S = 1.25, 1e-3


class StepTimes:
  """Remembers the last steps, as many as the pipeline has stages.

  Times are seconds on the engine's clock.

  Args:
    num_stages: of the pipeline.

  Attributes:
    cycle_s: the time between the end of the last step and of the one as many
      steps before it as there are stages, or of the first; None before there
      are two. A decode that was in every step it could be in waited so long.
  """

  def __init__(self, num_stages: int) -> None:
    self._ends: deque[float] = deque(maxlen=num_stages)
    self._rows: deque[int] = deque(maxlen=num_stages)
    self._expected_s: dict[int, float] = {}  # rows -> time of a step
    self.cycle_s: float | None = None

  def launched(self, num_rows: int) -> float:
    """Notes a launch; returns its term of `EngineMetrics.imbalance`."""
    self._rows.append(num_rows)
    return max(self._rows) * len(self._rows) / sum(self._rows) - 1

  def completed(self, num_rows: int, launched: float, now: float) -> float:
    """Notes that a step ends now; returns when the device began it."""
    began = self._began(launched)
    self._expected_s[num_rows] = min(
      now - began, _GROWTH * self._expected_s.get(num_rows, 0.0) + _GROWTH_S
    )
    self.cycle_s = now - self._ends[0] if self._ends else None
    self._ends.append(now)
    return began

  def next_launch(self, num_rows: int, launched: float) -> float:
    """Returns when to launch behind a step that computes."""
    seconds = self._expected_s.get(num_rows, 0.0)
    return self._began(launched) + (1 - _AHEAD) * seconds - _AHEAD_S

  def _began(self, launched: float) -> float:
    return max(launched, self._ends[-1]) if self._ends else launched
