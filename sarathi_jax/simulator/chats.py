# SPDX-License-Identifier: Apache-2.0
"""Chats: requests of which each begins with all that was said before.

A turn's prompt is the one before it, the answer to that, and a question. It
comes when its user has read and thought, after the last token of the answer.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
# Tokens that are in no question, and that all prompts of chats begin with.
_SYSTEM, _FILL = 1, 2
# The base of the digits by which questions differ; any vocabulary has these.
_BASE = 100


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Chats:
  """Who comes after whom, in a workload of n requests.

  Attributes:
    after: [n] the number of the request whose answer each follows, which is
      less than its own; -1 for the first turn of a chat.
    think_s: [n] seconds from the last token of that answer; 0 for -1.
    question_lens: [n] tokens of each prompt that are new.
    system_len: tokens that all prompts begin with.
  """

  after: Ints
  think_s: Floats
  question_lens: Ints
  system_len: int

  def next_of(self) -> dict[int, int]:
    """Returns the turn that follows each one that has one."""
    return {int(j): i for i, j in enumerate(self.after) if j >= 0}

  def question(self, i: int) -> tuple[int, ...]:
    """Returns the tokens that the prompt of request i ends with.

    Long ones differ from all others'; so do those of a first turn, after the
    tokens that all begin with.
    """
    digits = tuple(3 + i // _BASE**j % _BASE for j in range(4))
    num = int(self.question_lens[i])
    question = (*digits[:num], *(_FILL,) * (num - len(digits)))
    if self.after[i] >= 0:
      return question
    return (*(_SYSTEM,) * self.system_len, *question)

  def arrivals(self, first: Floats) -> tuple[Floats, Ints]:
    """Returns when all come, if answers take no time.

    Args:
      first: [chats] when they begin, in order.

    Returns:
      arrived_at: [n] of each request, as they are numbered now.
      order: [n] their numbers, by arrival.
    """
    arrived_at = np.empty(len(self.after))
    arrived_at[self.after < 0] = first
    for i, before in enumerate(self.after):
      if before >= 0:  # And before < i.
        arrived_at[i] = arrived_at[before] + self.think_s[i]
    return arrived_at, arrived_at.argsort(kind='stable')

  def ordered(self, order: Ints) -> Chats:
    """Returns the same, of requests whose numbers change.

    Args:
      order: [n] the number that each had before.
    """
    number = np.empty_like(order)
    number[order] = np.arange(len(order))
    after = self.after[order]
    return dataclasses.replace(
      self,
      after=np.where(after < 0, -1, number[after]),
      think_s=self.think_s[order],
      question_lens=self.question_lens[order],
    )


def make(
  rng: np.random.Generator,
  questions: Ints,
  outputs: Ints,
  *,
  turns: float,
  think_s: float,
  system_len: int,
  max_len: int,
) -> tuple[Chats, Ints, Ints]:
  """Makes chats of the turns that have these lengths.

  Args:
    rng: decides which follow each other.
    questions, outputs: [n] tokens of each turn, its own.
    turns: the mean number of turns, but for chats that grow too long.
    think_s: the mean time between an answer and the next turn.
    system_len: tokens that all prompts begin with.
    max_len: the most tokens of a chat. What a single turn has beyond is cut.

  Returns:
    The chats, and the lengths of whole prompts and of outputs, [n] each.
  """
  n = len(questions)
  goes_on = rng.random(n) >= 1 / turns
  pauses = rng.exponential(think_s, n) if think_s else np.zeros(n)
  after = np.full(n, -1)
  outputs = outputs.clip(max=max(1, max_len - system_len - 1))
  questions = questions.clip(max=np.maximum(1, max_len - system_len - outputs))
  prompts = system_len + questions
  for i in range(1, n):
    before = int(prompts[i - 1] + outputs[i - 1])
    if goes_on[i] and before + questions[i] + outputs[i] <= max_len:
      after[i] = i - 1
      prompts[i] = before + questions[i]
  chats = Chats(after, np.where(after < 0, 0.0, pauses), questions, system_len)
  return chats, prompts, outputs
