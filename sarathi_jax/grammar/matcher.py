# SPDX-License-Identifier: Apache-2.0
"""Follows outputs through their grammars, and says what may come next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import llguidance
import numpy as np


class Ends(NamedTuple):
  """The tokens that may end an output, beside its grammar.

  Attributes:
    eos: the model's own.
    others: what ends the request as well, where the model's own may come.
    ignores_eos: whether the model's own end nothing.
  """

  eos: tuple[int, ...]
  others: tuple[int, ...] = ()
  ignores_eos: bool = False


class Matcher:
  """Where one output is in its grammar. One thread at a time may use it.

  Args:
    inner: llguidance's, at the beginning of the output; is this one's alone.
    ends: see `Ends`.

  Attributes:
    num_consumed: tokens of the output so far.
  """

  def __init__(self, inner: llguidance.LLMatcher, ends: Ends) -> None:
    self.inner = inner
    self.num_consumed = 0
    self._ends = ends

  def consume(self, tokens: Sequence[int]) -> None:
    """Takes in what was sampled; what it doesn't allow is a `fault`."""
    self.inner.consume_tokens(list(tokens))
    self.num_consumed += len(tokens)

  @property
  def is_over(self) -> bool:
    """Whether nothing may come any more, at the grammar's end or by a fault."""
    return self.inner.is_stopped()

  @property
  def fault(self) -> str:
    """Why the grammar can't go on: llguidance's words; '' if it can."""
    return self.inner.get_error()

  def mend(self, mask: np.ndarray) -> None:
    """Makes a mask of the grammar's one of the request's.

    Args:
      mask: [ceil(V / 32)] int32, see `Grammars.masks`.
    """
    ends = self._ends
    if not (ends.others or ends.ignores_eos):
      return
    if ends.others and self.inner.is_accepting():
      for token in ends.others:
        mask[token // 32] |= _bit(token)
    if ends.ignores_eos:
      kept = mask.copy()
      for token in ends.eos:
        kept[token // 32] &= ~_bit(token)
      if kept.any():  # else only an empty output would do
        mask[:] = kept


def _bit(token: int) -> np.int32:
  return np.uint32(1 << token % 32).view(np.int32)
