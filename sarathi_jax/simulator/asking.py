# SPDX-License-Identifier: Apache-2.0
"""Makes a workload's requests when they come: those of chats, after answers."""

from __future__ import annotations

from collections.abc import Iterator
import heapq
import math

from sarathi_jax import types
from sarathi_jax.simulator import workload as workload_lib

_TOKEN = 1  # Any would do, as in the paper's artifact.


class Asking:
  """Who asks the requests of a workload.

  Args:
    workload: what comes, and when.
    began: when the first one comes, seconds on the engine's clock.

  Attributes:
    asked: ids of the requests that were taken, the numbers that they have.
  """

  def __init__(self, workload: workload_lib.Workload, began: float) -> None:
    self._workload = workload
    chats = workload.chats
    self._chats = chats
    # (when, number) of those that come whatever is answered.
    arrivals = (workload.arrived_at - workload.arrived_at[0] + began).tolist()
    self._coming = [
      (arrivals[i], i)
      for i in range(len(workload))
      if chats is None or chats.after[i] < 0
    ]
    heapq.heapify(self._coming)
    self._next_of = {} if chats is None else chats.next_of()
    # What was said so far in chats that go on, by the last turn's number.
    self._said: dict[int, tuple[int, ...]] = {}
    self._answers: dict[int, list[int]] = {}
    self._same: dict[int, tuple[int, ...]] = {}  # length -> prompt
    self.asked: list[str] = []

  @property
  def next_at(self) -> float:
    """When the next one comes, as far as is known; inf for never."""
    return self._coming[0][0] if self._coming else math.inf

  def take(self, now: float) -> Iterator[types.Request]:
    """Yields the requests that have come by `now`."""
    while self._coming and self._coming[0][0] <= now:
      arrival, i = heapq.heappop(self._coming)
      self.asked.append(str(i))
      prompt, salt = self._prompt(i)
      yield types.Request(
        request_id=str(i),
        prompt_token_ids=prompt,
        arrival_time=arrival,
        sampling=self._workload.sampling(i),
        tier=self._workload.tier(i),
        cache_salt=salt,
      )

  def hear(self, delta: types.OutputDelta, now: float) -> None:
    """Takes in what an engine answered at `now`."""
    if not self._next_of:
      return
    i = int(delta.request_id)
    if i not in self._next_of:
      return
    answer = self._answers.setdefault(i, [])
    answer += delta.token_ids
    if delta.finish_reason is not None:
      follower = self._next_of.pop(i)
      assert self._chats is not None
      self._said[follower] = (*self._said.pop(i), *self._answers.pop(i))
      when = now + float(self._chats.think_s[follower])
      heapq.heappush(self._coming, (when, follower))

  def _prompt(self, i: int) -> tuple[tuple[int, ...], str]:
    """Returns a request's prompt and its salt."""
    if self._chats is None:
      length = int(self._workload.prompt_lens[i])
      prompt = self._same.setdefault(length, (_TOKEN,) * length)
      return prompt, str(i)  # They are alike only in that they are made up.
    prompt = (*self._said.pop(i, ()), *self._chats.question(i))
    if i in self._next_of:
      self._said[i] = prompt
    return prompt, ''
