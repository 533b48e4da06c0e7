# SPDX-License-Identifier: Apache-2.0
"""Follows outputs through their grammars, and says what may come next."""

from __future__ import annotations

from collections.abc import Sequence
import time
from typing import NamedTuple

import llguidance
import numpy as np

# Of masks, on average and beyond that at once. With 131,072 tokens they take
# 0.01 to 1 ms, and up to 25 ms where much comes that was not there before.
_EACH_S, _AT_ONCE_S = 0.003, 0.25
_SLOW = 'Its masks take too long: make the grammar less ambiguous.'


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


class Allowance:
  """The time that the masks of one request may take, all its outputs'.

  A grammar of a few characters can have a mask take 0.1 s, for which all
  requests of a step wait. The time is the processor's, in seconds: a busy
  machine ends nobody's output.
  """

  def __init__(self) -> None:
    self._left = _AT_ONCE_S

  def take(self, seconds: float) -> None:
    """Takes the time of a mask, and puts back that of a usual one."""
    self._left = min(self._left + _EACH_S, _AT_ONCE_S) - seconds

  @property
  def is_spent(self) -> bool:
    return self._left < 0


class Matcher:
  """Where one output is in its grammar. One thread at a time may use it.

  Args:
    inner: llguidance's, at the beginning of the output; is this one's alone.
    num_words: of a mask, ceil(V / 32), with V that of llguidance's vocabulary.
    ends: see `Ends`.
    allowance: of its request.

  Attributes:
    num_consumed: tokens of the output so far.
  """

  def __init__(
    self,
    inner: llguidance.LLMatcher,
    num_words: int,
    ends: Ends,
    allowance: Allowance,
  ) -> None:
    self.inner = inner
    self.num_consumed = 0
    self._num_words = num_words
    self._allowed: np.ndarray | None = None  # by the grammar, next
    self._ends = ends
    self._allowance = allowance

  def consume(self, tokens: Sequence[int]) -> None:
    """Takes in what was sampled; what it doesn't allow is a `fault`."""
    self._allowed = None
    self.inner.consume_tokens(list(tokens))
    self.num_consumed += len(tokens)

  @property
  def is_over(self) -> bool:
    """Whether nothing may come any more, at the grammar's end or by a fault.

    Of some ends llguidance tells but by the mask: then the model's own may
    come, and no other token; whatever rules that out, the output is over.
    """
    if self._allowance.is_spent or self.inner.is_stopped():
      return True
    if not self.num_consumed or not self.inner.is_accepting():
      return False
    rest = self._mask().copy()
    _clear(rest, self._ends.eos)
    return self._allowance.is_spent or not rest.any()

  @property
  def fault(self) -> str:
    """Why the grammar can't go on, by llguidance's words; '' if it can."""
    return self.inner.get_error() or _SLOW * self._allowance.is_spent

  def fill(self, mask: np.ndarray) -> None:
    """Says which tokens may come next.

    Args:
      mask: [num_words] int32, see `Grammars.masks`.
    """
    mask[:] = self._mask()
    ends = self._ends
    if ends.others and self.inner.is_accepting():
      for token in ends.others:
        mask[token // 32] |= _bit(token)
    if ends.ignores_eos:
      _clear(mask, ends.eos)

  def _mask(self) -> np.ndarray:
    """Returns the grammar's own mask; computes it without the interpreter."""
    if self._allowed is None:
      self._allowed = mask = np.zeros(self._num_words, np.int32)
      began = time.thread_time()
      self.inner.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
      self._allowance.take(time.thread_time() - began)
    return self._allowed


def _clear(mask: np.ndarray, tokens: Sequence[int]) -> None:
  for token in tokens:
    mask[token // 32] &= ~_bit(token)


def _bit(token: int) -> np.int32:
  return np.uint32(1 << token % 32).view(np.int32)
