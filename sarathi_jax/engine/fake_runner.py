# SPDX-License-Identifier: Apache-2.0
"""A runner without a model, for tests and for measuring everything else."""

from __future__ import annotations

from sarathi_jax import types


class FakeRunner:
  """The token after t is (t + 1) mod vocab_size: checkable by hand.

  Like a device, it keeps the last sampled token of each slot, so look-ahead
  works, and it refuses what a device would get wrong.
  """

  def __init__(self, vocab_size: int, max_num_seqs: int) -> None:
    self.vocab_size = vocab_size
    self._last = [-1] * max_num_seqs

  def launch(self, batch: types.ScheduledBatch) -> types.Sampled:
    tokens = []
    for chunk in batch.chunks:
      last = chunk.tokens[-1] if chunk.tokens else self._last[chunk.slot]
      assert last >= 0, f'{chunk.request_id}: no token in slot {chunk.slot}'
      token = (last + 1) % self.vocab_size
      if chunk.samples:
        self._last[chunk.slot] = token
      tokens.append(token)
    return types.Sampled(tokens, [0.0] * len(tokens))

  def fetch(self, pending: types.Sampled) -> types.Sampled:
    return pending

  def recover(self) -> None:
    """Has nothing to make anew."""

  def num_rows(self, num_tokens: int) -> int:
    return num_tokens
