# SPDX-License-Identifier: Apache-2.0
"""Compiles grammars, and keeps those that were asked for lately."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
import functools
import re
import threading
import time

import llguidance
import numpy as np

from sarathi_jax import errors
from sarathi_jax import structured_outputs
from sarathi_jax import types
from sarathi_jax.grammar import matcher as matcher_lib
from sarathi_jax.grammar import texts
from sarathi_jax.grammar import vocabulary
from sarathi_jax.text import tokenizer as tokenizer_lib

Params = structured_outputs.StructuredOutputsParams
_KEPT = 256  # grammars
# Of all that are kept: the processor's time that it took to compile them, which
# goes with their memory, and characters of what they were made of.
_KEPT_S, _KEPT_CHARS = 2.0, 4 << 20
_FAULT_CHARS = 1024  # of llguidance's words
# Of llguidance's words: where in the text that we wrote, and that text; and our
# line after a grammar that a client wrote.
_OURS = re.compile(
  r'^at \d+\(\d+\): failed to compile JSON schema: |\n +\d+ \| .*', re.DOTALL
)
# Its word for what can't begin, and its mark of words that it left out.
_NOTHING, _LEFT_OUT = 'NoExtension', '<non-verbose/>'
_OUR_LINE = re.compile(rf'\n +\d+ \| {re.escape(texts.END.strip())}')


class Grammar:
  """A compiled grammar, which many outputs may follow.

  Args:
    inner: llguidance's, at the beginning.
    num_words: of its masks.
    eos_token_ids: those of the vocabulary.
    begins: which tokens may come first, [V] bool.

  Attributes:
    is_empty: whether only an empty output fits.
  """

  def __init__(
    self,
    inner: llguidance.LLMatcher,
    num_words: int,
    eos_token_ids: tuple[int, ...],
    begins: np.ndarray,
  ) -> None:
    self._inner = inner
    self._num_words = num_words
    self._eos_token_ids = eos_token_ids
    self._begins = np.packbits(begins)  # many are kept, and V may be large
    self._vocab_size = len(begins)
    first = np.flatnonzero(begins).tolist()
    self.is_empty = set(first).issubset(eos_token_ids)

  @property
  def begins(self) -> np.ndarray:
    """Which tokens may come first, [V] bool."""
    return np.unpackbits(self._begins, count=self._vocab_size).view(bool)

  def matchers(
    self, sampling: types.SamplingParams
  ) -> list[matcher_lib.Matcher]:
    """Returns where a request's outputs are before their first tokens."""
    ends = matcher_lib.Ends(
      self._eos_token_ids, sampling.stop_token_ids, sampling.ignore_eos
    )
    allowance = matcher_lib.Allowance()
    return [
      matcher_lib.Matcher(
        self._inner.deep_copy(), self._num_words, ends, allowance
      )
      for _ in range(sampling.n)
    ]


class Grammars:
  """The grammars of one model's outputs.

  Any thread may compile one; one at a time may ask for masks.

  Args:
    tokenizer: the model's.
    vocab_size: its ids; those that the tokenizer doesn't know are never
      allowed.
    eos_token_ids: the tokens of which one ends an output.
  """

  def __init__(
    self,
    tokenizer: tokenizer_lib.Tokenizer,
    vocab_size: int,
    eos_token_ids: tuple[int, ...],
  ) -> None:
    self._tokenizer = tokenizer
    self._vocab_size = vocab_size
    self._eos_token_ids = eos_token_ids
    self._lock = threading.Lock()
    self._vocabulary: llguidance.LLTokenizer | None = None
    # What was asked for -> its grammar, or what is wrong with it, and its share
    # of what may be kept.
    self._kept: OrderedDict[Params, tuple[Grammar | str, float]] = OrderedDict()

  def warm_up(self) -> None:
    """Reads the vocabulary, which keeps the interpreter: 1 s for 150,000."""
    with self._lock:
      if self._vocabulary is None:
        self._vocabulary = vocabulary.read(
          self._tokenizer, self._vocab_size, self._eos_token_ids
        )

  def compile(self, outputs: Params) -> Grammar:
    """Returns the grammar of what a request asks for.

    Raises:
      InvalidRequestError: there is none, or it is too large; says why in
        llguidance's words.
    """
    with self._lock:
      found, _ = self._kept.get(outputs, (None, 0.0))
      if found is not None:
        self._kept.move_to_end(outputs)
    if found is None:
      self.warm_up()
      began = time.thread_time()
      found = self._compile(outputs)
      self._keep(outputs, found, time.thread_time() - began)
    if isinstance(found, str):
      if isinstance(outputs, structured_outputs.ReplyParams) and outputs.answer:
        self.compile(outputs.answer)  # Says so if that is what is wrong.
      raise errors.InvalidRequestError(
        f'{outputs.shown(outputs.kind)}: {found}'
      )
    return found

  def masks(self, matchers: Sequence[matcher_lib.Matcher]) -> np.ndarray:
    """Returns which tokens may come next, of each output.

    Returns:
      [len(matchers), ceil(V / 32)] int32: token i is bit i % 32 of word
      i // 32. Bits beyond V may be anything.
    """
    found = np.empty((len(matchers), self._num_words), np.int32)
    # One by one: its own threads took 2 to 7 times as long on two cores.
    for matcher, mask in zip(matchers, found, strict=True):
      matcher.fill(mask)
    return found[:, : -(-self._vocab_size // 32)]

  @property
  def _num_words(self) -> int:
    assert self._vocabulary is not None
    return -(-self._vocabulary.vocab_size // 32)

  def _compile(self, outputs: Params) -> Grammar | str:
    assert self._vocabulary is not None
    try:
      text = texts.text_of(outputs, self._tokenizer.added_tokens)
    except errors.SarathiError:
      raise
    except (ValueError, RecursionError) as error:
      return errors.cut(str(error), _FAULT_CHARS)
    inner = llguidance.LLMatcher(
      self._vocabulary, text, log_level=0, limits=_limits()
    )
    # The first mask takes the longest: here it does so once, and may fail.
    mask = np.frombuffer(inner.compute_bitmask(), np.uint8)
    fault = inner.get_error()
    if fault.startswith(_NOTHING):
      return 'no output fits it.'
    if fault:
      fault = fault.replace(_LEFT_OUT, '')
      ours = _OUR_LINE if outputs.kind == 'grammar' else _OURS
      return errors.cut(ours.sub('', fault).strip(), _FAULT_CHARS)
    bits = np.unpackbits(mask, bitorder='little')
    begins = bits[: self._vocab_size].view(bool)
    if not begins.any():
      return 'no token of this model begins such an output.'
    eos = vocabulary.ends(self._vocab_size, self._eos_token_ids)
    return Grammar(inner, self._num_words, eos, begins)

  def _keep(
    self, outputs: Params, found: Grammar | str, seconds: float
  ) -> None:
    share = seconds / _KEPT_S + outputs.num_chars / _KEPT_CHARS
    with self._lock:
      self._kept[outputs] = found, share
      total = sum(share for _, share in self._kept.values())
      while len(self._kept) > _KEPT or (total > 1 and len(self._kept) > 1):
        _, (_, share) = self._kept.popitem(last=False)
        total -= share


@functools.cache
def _limits() -> llguidance.LLParserLimits:
  """Returns bounds of time and memory, a fifth to a half of the defaults.

  Fuel is of regular expressions. Without the bounds, outputs grew to 110 MB
  each, and a mask took 2.6 s. With 131,072 tokens, grammars of 32,768
  characters took up to 500,000 at first (all parts of a text) and 25,000 in a
  step, and a string of at most 20,000 characters 4 states a character.
  """
  return llguidance.LLParserLimits(
    verbose_errors=False,
    initial_lexer_fuel=500_000,
    step_lexer_fuel=100_000,
    max_lexer_states=65_536,
    step_max_items=10_000,
    max_items_in_row=1000,
  )
