# SPDX-License-Identifier: Apache-2.0
"""A runner without a model, for tests and for measuring everything else."""

from __future__ import annotations

from collections import deque
import time

from sarathi_jax import types


class FakeRunner:
  """A `Runner` whose token after t is (t + 1) mod vocab_size.

  So outputs can be checked by hand. Like a device, it keeps the last sampled
  token of each slot, so look-ahead works. It refuses what a device would get
  wrong.

  Args:
    vocab_size: V.
    max_num_seqs: slots.
    step_s: the time that a step takes, seconds.
  """

  def __init__(
    self, vocab_size: int, max_num_seqs: int, step_s: float = 0.0
  ) -> None:
    self.vocab_size = vocab_size
    self._step_s = step_s
    self._last = [-1] * max_num_seqs
    self._done = 0.0  # when the steps launched so far are computed
    self._ends: deque[float] = deque()  # of those not fetched

  def launch(self, batch: types.ScheduledBatch) -> types.Sampled:
    tokens: list[int] = []
    for chunk in batch.chunks:
      last = chunk.tokens[-1] if chunk.tokens else self._last[chunk.slot]
      assert last >= 0, f'{chunk.request_id}: no token in slot {chunk.slot}'
      token = (last + 1) % self.vocab_size
      if chunk.samples:
        self._last[chunk.slot] = token
        tokens.append(token)
    if self._step_s:
      self._done = max(self._done, time.monotonic()) + self._step_s
      self._ends.append(self._done)
    return types.Sampled.of(batch.chunks, tokens, [0.0] * len(tokens))

  def fetch(self, pending: types.Sampled) -> types.Sampled:
    if self._ends:
      time.sleep(max(0.0, self._ends.popleft() - time.monotonic()))
    return pending

  def recover(self) -> None:
    self._ends.clear()

  def num_rows(self, num_tokens: int) -> int:
    return num_tokens
