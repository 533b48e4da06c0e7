# SPDX-License-Identifier: Apache-2.0
"""Tells llguidance of a tokenizer's tokens."""

from __future__ import annotations

from typing import Any

import llguidance

from sarathi_jax.text import tokenizer as tokenizer_lib


def read(
  tokenizer: tokenizer_lib.Tokenizer,
  vocab_size: int,
  eos_token_ids: tuple[int, ...],
) -> llguidance.LLTokenizer:
  """Reads a vocabulary.

  Keeps the interpreter as long as it takes: 1 s for 150,000 tokens.

  Args:
    tokenizer: a model's.
    vocab_size: V, the model's.
    eos_token_ids: the tokens of which one ends an output.

  Returns:
    One of V tokens or more; what is beyond them, no output can have.
  """
  eos = ends(vocab_size, eos_token_ids)
  num = max(vocab_size, *(token + 1 for token in eos))
  options: dict[str, Any] = {'n_vocab': num, 'eos_token': list(eos)}
  try:
    return llguidance.LLTokenizer(tokenizer.to_json(), **options)
  except ValueError:  # It is none of the kinds that llguidance reads.
    pieces: Any = _Pieces(tokenizer, num, eos[0])
    options['n_vocab'] = len(pieces.tokens)
    return llguidance.LLTokenizer(
      llguidance.TokenizerWrapper(pieces), **options
    )


def ends(vocab_size: int, eos_token_ids: tuple[int, ...]) -> tuple[int, ...]:
  """Returns a vocabulary's ends: the model's; else one beyond its tokens."""
  return eos_token_ids or (vocab_size,)


class _Pieces:
  """Tokens by their bytes: what llguidance asks of a tokenizer in Python.

  It takes for granted that each byte is a token. Those that are none become
  some, after all others, so that no output can have them; an output that can't
  go on without them ends with an error.
  """

  bos_token_id = None

  def __init__(
    self, tokenizer: tokenizer_lib.Tokenizer, num: int, eos: int
  ) -> None:
    special = tokenizer.special_tokens
    self.eos_token_id = eos
    self.special_token_ids = sorted({eos, *(i for i in special if i < num)})
    self.tokens = [tokenizer.bytes_of(i) for i in range(num)]
    known = set(self.tokens)
    self.tokens += [
      bytes([byte]) for byte in range(256) if bytes([byte]) not in known
    ]
    self._ids = {
      piece: i
      for i, piece in enumerate(self.tokens)
      if piece and i not in special
    }
    self._longest = max(map(len, self._ids))

  def __call__(self, text: bytes) -> list[int]:
    """Returns the longest tokens, one by one, that make up a text."""
    ids, start = [], 0
    while start < len(text):
      stop = next(
        stop
        for stop in range(start + self._longest, start, -1)
        if text[start:stop] in self._ids
      )
      ids.append(self._ids[text[start:stop]])
      start = stop
    return ids
