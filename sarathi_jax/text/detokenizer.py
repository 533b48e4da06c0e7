# SPDX-License-Identifier: Apache-2.0
"""Turns a running request's tokens into text, and finds its stop strings."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from sarathi_jax import types
from sarathi_jax.text import tokenizer as tokenizer_lib


def _num_held_back(text: str, stops: tuple[str, ...]) -> int:
  """Counts the characters at the end of `text` that may begin a stop string.

  Worked example: 'abc EN' with stop 'END' -> 2.
  """
  longest = 0
  for stop in stops:
    # Looks only where its first character is: there are few such places.
    start = text.find(stop[0], max(len(text) - len(stop) + 1, 0))
    while 0 <= start < len(text) - longest:
      if stop.startswith(text[start:]):
        longest = len(text) - start
        break
      start = text.find(stop[0], start + 1)
  return longest


class _Pending(NamedTuple):
  """Text that is searched for stop strings.

  Attributes:
    text: the text; it has special tokens if a stop string has one.
    shown: for each character '1' if it may be shown, '0' if it is part of a
      special token that is left out; '' if all may be shown.
  """

  text: str
  shown: str

  def plus(self, other: _Pending) -> _Pending:
    return _Pending(self.text + other.text, self.shown + other.shown)

  def part(self, start: int, stop: int) -> _Pending:
    return _Pending(self.text[start:stop], self.shown[start:stop])

  def visible(self) -> str:
    if '0' not in self.shown:
      return self.text
    return ''.join(
      c for c, shown in zip(self.text, self.shown, strict=True) if shown == '1'
    )


_NONE = _Pending('', '')


def has_special(special: Collection[str], stops: tuple[str, ...]) -> bool:
  """Whether a stop string has the text of a special token in it."""
  joined = '\0'.join(stops)  # Most are in none, which one search tells.
  return any(
    text in joined and any(text in stop for stop in stops) for text in special
  )


class Detokenizer:
  """Turns one request's tokens into the text that may be shown.

  A stop string may be a special token's text, or have one in it. It is found
  where special tokens are left out of the text, too, but for those that the
  request wants shown. One that ends within the
  request's `min_tokens` is text like any other.

  Args:
    tokenizer: the model's.
    request: the request.
    has_special: that of its stop strings; to be found once for all outputs.
  """

  def __init__(
    self,
    tokenizer: tokenizer_lib.Tokenizer,
    request: types.Request,
    has_special: bool,
  ) -> None:
    sampling = request.sampling
    self._stops = sampling.stop
    self._keep_stop = sampling.include_stop_str_in_output
    # Tokens that are yet to come before a stop string may end the request.
    self._num_unheeded = sampling.min_tokens if self._stops else 0
    skip = sampling.skip_special_tokens
    self._shown = request.shown_token_ids
    # Whether special tokens are decoded: some are to be shown, or stop strings
    # to be found in them. The others are left out here.
    decodes = bool(self._shown) or has_special
    self._hidden = tokenizer.special_tokens if skip and decodes else {}
    self._stream = tokenizer.stream(
      request.prompt_token_ids, skip and not decodes
    )
    self._held = _NONE

  def read(
    self,
    tokens: Sequence[int],
    ended_by_token: bool,
  ) -> tuple[str, str | None, int]:
    """Takes in several tokens, as `step`, until a stop string is complete.

    Returns:
      What `step` does, and how many tokens were taken in.
    """
    text, stop, num = '', None, 0
    for num, token in enumerate(tokens, 1):
      more, stop = self.step(token, ended_by_token and num == len(tokens))
      text += more
      if stop is not None:
        break
    return text, stop, num

  def step(self, token: int, ended_by_token: bool) -> tuple[str, str | None]:
    """Takes in a token.

    Args:
      token: its id.
      ended_by_token: whether it is the stop token that ends the request; its
        text is left out then, like a stop string's.

    Returns:
      Text to show now, and the stop string that ends the request, if any.
    """
    if ended_by_token and not self._keep_stop:
      return self.flush(), None
    new = self._stream.step(token)
    if not self._stops and not self._hidden:
      return new, None
    if not self._hidden:
      return self._find_stop(_Pending(new, ''))
    special = '' if token in self._shown else self._hidden.get(token, '')
    num_hidden = len(special) if new.endswith(special) else 0
    return self._find_stop(
      _Pending(new, '1' * (len(new) - num_hidden) + '0' * num_hidden)
    )

  def _find_stop(self, new: _Pending) -> tuple[str, str | None]:
    pending = self._held.plus(new)
    text = pending.text
    found = []
    if self._num_unheeded:
      self._num_unheeded -= 1
    else:
      # One that was there before was complete within `min_tokens`.
      num_held = len(self._held.text)
      starts = [
        (text.find(s, max(num_held - len(s) + 1, 0)), s) for s in self._stops
      ]
      found = [start for start in starts if start[0] >= 0]
    if found:
      start, stop = min(found, key=lambda f: (f[0], -len(f[1])))
      self._held = _NONE
      return (
        pending.part(0, start).visible() + (stop if self._keep_stop else '')
      ), stop
    cut = len(text) - _num_held_back(text, self._stops)
    self._held = pending.part(cut, len(text))
    return pending.part(0, cut).visible(), None

  def flush(self) -> str:
    """Returns what was held back, once the request has ended otherwise."""
    held, self._held = self._held, _NONE
    return held.visible()
