# SPDX-License-Identifier: Apache-2.0
"""Text of a running request, ended by its stop strings."""

from __future__ import annotations

from sarathi_jax import types
from sarathi_jax.engine import tokenizer as tokenizer_lib


def _num_held_back(text: str, stops: tuple[str, ...]) -> int:
  """Characters at the end of `text` that may begin a stop string.

  'abc EN' with stop 'END' -> 2
  """
  longest = 0
  for stop in stops:
    for n in range(min(len(stop) - 1, len(text)), longest, -1):
      if text.endswith(stop[:n]):
        longest = n
        break
  return longest


class Detokenizer:
  """Turns one request's tokens into the text that may be shown."""

  def __init__(self, tokenizer: tokenizer_lib.Tokenizer,
               request: types.Request) -> None:
    sampling = request.sampling
    self._stops = sampling.stop
    self._keep_stop = sampling.include_stop_str_in_output
    self._stream = tokenizer.stream(
      request.prompt_token_ids, sampling.skip_special_tokens)
    self._held = ''

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
    return self._find_stop(new) if self._stops else (new, None)

  def _find_stop(self, new: str) -> tuple[str, str | None]:
    text = self._held + new
    found = [(text.find(s), s) for s in self._stops if s in text]
    if found:
      start, stop = min(found, key=lambda f: (f[0], -len(f[1])))
      self._held = ''
      return text[:start + (len(stop) if self._keep_stop else 0)], stop
    cut = len(text) - _num_held_back(text, self._stops)
    self._held = text[cut:]
    return text[:cut], None

  def flush(self) -> str:
    """What was held back, once the request has ended otherwise."""
    held, self._held = self._held, ''
    return held
