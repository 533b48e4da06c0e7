# SPDX-License-Identifier: Apache-2.0
"""Turns tokens into text as they come; gives whole characters only.

A text that ends with U+FFFD either ends within a character or has that very
character, as damaged texts do. Only the tokens' bytes can tell which.
"""

from __future__ import annotations

from collections.abc import Sequence
import re

import tokenizers
from tokenizers import decoders

_REPLACEMENT = '\ufffd'
# Tokens at a prompt's end that are looked at: they tell whether the first word
# begins with a space, and whether a character is unfinished.
_NUM_SEEN = 8
_MOST_BYTES = 4  # of a character
_SPACE = '\u2581'  # a space, in the pieces of SentencePiece's tokenizers


def _byte_level_alphabet() -> dict[str, int]:
  """Returns the bytes that characters of byte-level pieces stand for (GPT-2).

  Printable bytes stand for themselves; the others come after them.
  """
  shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  hidden = [byte for byte in range(0x100) if byte not in shown]
  return {chr(byte): byte for byte in shown} | {
    chr(0x100 + i): byte for i, byte in enumerate(hidden)
  }


_ALPHABET = _byte_level_alphabet()


class Pieces:
  """The bytes of a tokenizer's tokens.

  Attributes:
    added: texts of the tokens that only their whole texts are, by id.
    special: those of them that are left out of a text.
  """

  def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
    self._tokenizer = tokenizer
    added = tokenizer.get_added_tokens_decoder()
    self.added = {token: piece.content for token, piece in added.items()}
    self.special = {
      token: piece.content for token, piece in added.items() if piece.special
    }
    decoder = tokenizer.decoder.__getstate__() if tokenizer.decoder else b''
    self._is_byte_level = b'"ByteLevel"' in decoder
    self._has_byte_pieces = b'"ByteFallback"' in decoder
    self._has_spaces = _SPACE.encode() in decoder

  def bytes_of(self, token: int) -> bytes:
    """Returns the bytes that a token adds to the text; b'' if it is unknown."""
    if token in self.added:
      return self.added[token].encode()
    piece = self._tokenizer.id_to_token(token) or ''
    if self._is_byte_level and all(c in _ALPHABET for c in piece):
      return bytes(_ALPHABET[c] for c in piece)
    if self._has_byte_pieces and re.fullmatch('<0x[0-9A-F]{2}>', piece):
      return bytes([int(piece[3:5], 16)])
    return (piece.replace(_SPACE, ' ') if self._has_spaces else piece).encode()


def num_unfinished(data: bytes) -> int:
  """Counts the bytes at the end that begin a character and do not end it.

  Worked example: b'a\\xf0\\x9f' -> 2.
  """
  for n in range(1, min(_MOST_BYTES, len(data) + 1)):
    try:
      data[-n:].decode()
    except UnicodeDecodeError as error:
      if error.start == 0 and error.reason == 'unexpected end of data':
        return n
  return 0


class TextStream:
  """Turns the tokens that follow a prompt into text, one at a time.

  Args:
    tokenizer: decodes the tokens.
    pieces: the tokenizer's.
    prompt: the tokens before; their text is not given again.
    skip_special_tokens: whether to leave special tokens out.
  """

  def __init__(
    self,
    tokenizer: tokenizers.Tokenizer,
    pieces: Pieces,
    prompt: Sequence[int],
    skip_special_tokens: bool,
  ) -> None:
    self._tokenizer = tokenizer
    self._pieces = pieces
    self._skip = skip_special_tokens
    # The tokens whose text the stream gave last, and the tokens since.
    self._given: list[int] = []
    self._held: list[int] = []
    self._num_shown = 0  # characters of the held tokens' text
    self._has_prompt = False  # whether some held tokens are the prompt's
    seen = list(prompt[self._start(prompt) :])
    if self._decode(seen).endswith(_REPLACEMENT):
      self._stream = decoders.DecodeStream(skip_special_tokens=self._skip)
      for token in seen:
        self.step(token)
      self._has_prompt = bool(self._held)
    else:
      self._given = seen
      self._stream = decoders.DecodeStream(
        ids=seen, skip_special_tokens=self._skip
      )

  def step(self, token: int) -> str:
    """Returns the text that `token` completes; '' within a character."""
    self._held.append(token)
    try:
      text = self._stream.step(self._tokenizer, token)
    except Exception:  # 'Invalid prefix': text that the next token rewrites.
      self._begin_anew()
      text = self._stream.step(self._tokenizer, token)
    start = self._num_shown
    if text:
      self._given, self._held, self._num_shown = self._held, [], 0
      self._has_prompt = False
    else:  # Still, it may be whole, or begin with whole characters.
      text = self._whole()
      self._num_shown = max(start, len(text))
    return text[start:]

  def _begin_anew(self) -> None:
    """Drops the tokens whose text was given, and keeps those that are held."""
    held = self._held[:-1]
    self._given = []
    if self._has_prompt or not self._decode(held).endswith(_REPLACEMENT):
      held, self._held, self._num_shown = [], self._held[-1:], 0
      self._has_prompt = False
    self._stream = decoders.DecodeStream(
      ids=held, skip_special_tokens=self._skip
    )

  def _start(self, prompt: Sequence[int]) -> int:
    """Returns where the prompt's last tokens begin, at a character's start."""
    last = max(len(prompt) - _NUM_SEEN, 0)
    for start in range(last, max(last - _MOST_BYTES, 0), -1):
      if not num_unfinished(self._bytes(prompt[max(start - 4, 0) : start])):
        return start
    return max(last - _MOST_BYTES, 0)

  def _whole(self) -> str:
    """Returns the text of the held tokens, less an unfinished character."""
    text = self._decode(self._given + self._held)
    if not text.endswith(_REPLACEMENT):
      return ''  # The stream itself will give this text.
    unfinished = num_unfinished(self._bytes(self._held[-_MOST_BYTES:]))
    kept = len(self._held)
    while unfinished > 0:
      kept -= 1
      unfinished -= len(self._bytes(self._held[kept : kept + 1]))
    before = self._decode(self._given)
    if unfinished == 0:
      text = self._decode(self._given + self._held[:kept])
    else:  # One token ends a character and begins another.
      text = text.removesuffix(_REPLACEMENT)
    return text[len(before) :] if text.startswith(before) else ''

  def _bytes(self, tokens: Sequence[int]) -> bytes:
    skipped = self._pieces.special if self._skip else {}
    return b''.join(
      self._pieces.bytes_of(token) for token in tokens if token not in skipped
    )

  def _decode(self, tokens: list[int]) -> str:
    text: str = self._tokenizer.decode(tokens, skip_special_tokens=self._skip)
    return text
