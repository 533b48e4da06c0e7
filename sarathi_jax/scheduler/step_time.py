# SPDX-License-Identifier: Apache-2.0
"""A small model of the time of a step, learnt from the steps themselves.

It is linear in a few features of a batch: its rows, by a piecewise linear
function (reading weights counts first, then arithmetic), its decodes and their
contexts, and what its chunks attend to. A Kalman filter fits the weights:
recursive least squares that never stop learning. Errors are relative, as steps
differ by a factor of a hundred. Standard library only: the scheduler asks it
before every step.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Callable, Iterable

from sarathi_jax import types

# Rows at which the piecewise linear function may bend; the last knot is the
# most rows of a step. Steps are padded to powers of two, so each small size has
# a time of its own.
_KNOTS = (0, *(8 << i for i in range(13)))
# Features are near 1 in these units.
_SEQS, _CONTEXT, _PAIRS = 1e-2, 1e-5, 1e-6
_PRIOR = 1e2  # variance of a weight of which nothing is known, seconds^2
_NOISE = 1e-3  # variance of a step's relative error
# How much weights may change from step to step, as a fraction of the step's
# time: with the noise, some hundred steps are averaged.
_DRIFT = 2e-4
# The fraction of steps that may take longer than predicted with the spread.
_TAIL = 0.005
_TAIL_GAIN = 0.02
_MAX_SPREAD = 0.5
_NUM_RECENT = 8192

Load = tuple[int, int, int, int]  # see load_of
NumRows = Callable[[int], int]  # of a batch of so many tokens


def load_of(chunks: Iterable[types.Chunk]) -> Load:
  """Counts the quantities that predict a batch's time.

  Returns:
    Its tokens; its decodes; the sum of their contexts; and the sum, over the
    tokens of all other chunks, of the tokens that they attend to.
  """
  tokens = num_decodes = context = pairs = 0
  for chunk in chunks:
    n = chunk.num_tokens
    tokens += n
    if chunk.is_prefill:
      pairs += n * (2 * chunk.start + n) // 2
    else:
      num_decodes += 1
      context += chunk.start
  return tokens, num_decodes, context, pairs


class StepTimeModel:
  """Predicts the seconds of a step; learns from each.

  Args:
    max_tokens: the most tokens of a step.
    num_rows: returns the rows computed for a batch of so many tokens, padding
      included; see `runner.Runner`.

  Attributes:
    num_rows: see above.
    spread: all but a small fraction of steps take at most (1 + spread) times
      the predicted time.
    num_observed: the number of steps that were learnt from.
    recent: the last steps that were learnt from, and their seconds.
  """

  def __init__(self, max_tokens: int, num_rows: NumRows = int) -> None:
    inner = [k for k in _KNOTS if k < max_tokens]
    self._knots = (*inner, max_tokens)
    size = len(self._knots) + 3
    self._weights = [0.0] * size
    self._cov = [[_PRIOR * (i == j) for j in range(size)] for i in range(size)]
    self.num_rows = num_rows
    self.spread = 0.02
    self.num_observed = 0
    self.recent: deque[tuple[Load, float]] = deque(maxlen=_NUM_RECENT)

  def predict(self, load: Load) -> float:
    """Returns the seconds that a step of this load takes on average."""
    weights = self._weights
    return sum(weights[i] * x for i, x in self._features(load))

  def observe(self, load: Load, seconds: float) -> None:
    """Learns from a completed step."""
    if seconds <= 0:
      return
    _, num_decodes, _, pairs = load
    if self.num_observed and num_decodes and pairs:
      self._learn_spread(seconds, self.predict(load))
    self.num_observed += 1
    self.recent.append((load, seconds))
    # Relative errors: features and result are divided by what was measured.
    h = [(i, x / seconds) for i, x in self._features(load)]
    cov = self._cov
    gain = [sum(row[i] * x for i, x in h) for row in cov]
    scale = 1 / (sum(gain[i] * x for i, x in h) + _NOISE)
    error = 1 - sum(self._weights[i] * x for i, x in h)
    for i, row in enumerate(cov):
      change = gain[i] * scale
      self._weights[i] += change * error
      for j, other in enumerate(gain):
        row[j] -= change * other
      row[i] = min(row[i] + (_DRIFT * seconds) ** 2, _PRIOR)

  def _learn_spread(self, seconds: float, predicted: float) -> None:
    """Raises the spread if a step exceeded it, else lowers it a little."""
    late = seconds > predicted * (1 + self.spread)
    self.spread = min(
      _MAX_SPREAD, max(0.0, self.spread + _TAIL_GAIN * (late - _TAIL))
    )

  def _features(self, load: Load) -> list[tuple[int, float]]:
    """Returns (index, value) of the features that are not 0."""
    tokens, num_decodes, context, pairs = load
    rows = self.num_rows(tokens)
    knots = self._knots
    last = len(knots) - 1
    right = min(bisect.bisect_left(knots, rows, 1), last)
    left = knots[right - 1]
    # Interpolates between the two nearest knots.
    part = (rows - left) / (knots[right] - left)
    found = [(right - 1, 1 - part), (right, part)]
    if num_decodes:
      found.append((last + 1, num_decodes * _SEQS))
      found.append((last + 2, context * _CONTEXT))
    if pairs:
      found.append((last + 3, pairs * _PAIRS))
    return found
