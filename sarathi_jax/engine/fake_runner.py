# SPDX-License-Identifier: Apache-2.0
"""A runner without a model, for tests and for measuring everything else."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
import itertools
import math
import time
from typing import Any

from sarathi_jax import types


class FakeRunner:
  """A `Runner` whose token after t is (t + 1) mod vocab_size.

  So outputs can be checked by hand. After t, token (t + 1 + d) mod vocab_size
  has the log-probability -d. Under a mask, it is the next that may come. Like a
  device, it keeps the last sampled token of each slot, so look-ahead works. It
  refuses what a device would get wrong.

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
    told: list[types.Told] = []
    prompts: list[types.Told] = []
    ends = [self._last_of(chunk) for chunk in batch.chunks]
    ends += [ends[fork.row] for fork in batch.forks]
    for chunk, last in zip(batch.samplers, ends, strict=True):
      token = (last + 1) % self.vocab_size
      sampling = chunk.sampling
      told.append(
        (
          self._tell(
            last, token, sampling.logprobs, sampling.logprob_token_ids
          ),
        )
        if chunk.samples and sampling.tells
        else ()
      )
      prompts.append(
        ()
        if chunk.next_token is None
        else tuple(
          self._tell(before, after, sampling.prompt_logprobs)
          for before, after in itertools.pairwise(
            (*chunk.tokens, chunk.next_token)
          )
          if after >= 0
        )
      )
      if chunk.samples:
        self._last[chunk.slot] = token
        tokens.append(token)
    if self._step_s:
      self._done = max(self._done, time.monotonic()) + self._step_s
      self._ends.append(self._done)
    tells_prompts = any(c.next_token is not None for c in batch.chunks)
    sampled = types.Sampled.of(
      batch.samplers, tokens, [0.0] * len(tokens)
    )._replace(
      told=told if any(told) else None,
      prompts=prompts if tells_prompts else None,
    )
    self._latest = sampled, batch.samplers
    return sampled

  def mask(self, pending: types.Sampled, masks: Mapping[int, Any]) -> None:
    latest, chunks = self._latest
    assert latest is pending, 'masks come before the next batch'
    for i, mask in masks.items():
      (first,) = pending.tokens[i]
      ids = ((first + n) % self.vocab_size for n in range(self.vocab_size))
      token = next((t for t in ids if mask[t // 32] >> t % 32 & 1), None)
      if token is None:
        pending.logprobs[i] = (math.nan,)
        continue
      pending.tokens[i] = (token,)
      self._last[chunks[i].slot] = token
      sampling = chunks[i].sampling
      if sampling.tells and pending.told is not None:
        pending.told[i] = (
          self._tell(
            first - 1, token, sampling.logprobs, sampling.logprob_token_ids
          ),
        )

  def _last_of(self, chunk: types.Chunk) -> int:
    last = chunk.tokens[-1] if chunk.tokens else self._last[chunk.slot]
    assert last >= 0, f'{chunk.request_id}: no token in slot {chunk.slot}'
    return last

  def _tell(
    self,
    before: int,
    token: int,
    num_top: int | None,
    named: tuple[int, ...] | None = None,
  ) -> types.TokenLogprobs:
    top = [(before + i + 1) % self.vocab_size for i in range(num_top or 0)]
    ids = (token, *top, *(named or ()))
    distances = [(i - before - 1) % self.vocab_size for i in ids]
    return types.TokenLogprobs(
      ids, tuple(0.0 - d for d in distances), distances[0] + 1
    )

  def fetch(self, pending: types.Sampled) -> types.Sampled:
    if self._ends:
      time.sleep(max(0.0, self._ends.popleft() - time.monotonic()))
    return pending

  def recover(self) -> None:
    self._ends.clear()

  def num_rows(self, num_tokens: int) -> int:
    return num_tokens
