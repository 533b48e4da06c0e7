# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities as OpenAI's forms tell them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
import itertools
from typing import Any, NamedTuple

from sarathi_jax import types
from sarathi_jax.server.protocols import messages
from sarathi_jax.text import tokenizer as tokenizer_lib

_CHARS = 64  # of each log-probability in a response, about
ID_CHARS = 8  # of a token id
_Tokenizer = tokenizer_lib.Tokenizer | None


class Position(NamedTuple):
  """What is told at one place of a text.

  Attributes:
    token: the bytes of the token that is there.
    logprob: its log-probability; None for the first token of a prompt.
    others: bytes and log-probability of each of those that are asked for.
  """

  token: bytes
  logprob: float | None
  others: list[tuple[bytes, float]]


def num_chars(delta: types.OutputDelta) -> int:
  """Returns about how many characters it takes to tell of an output."""
  num = len(delta.text) + ID_CHARS * len(delta.token_ids)
  if isinstance(delta.stop_reason, str):
    num += len(delta.stop_reason)
  return num + _CHARS * messages.num_told(delta)


def of_output(
  delta: types.OutputDelta | types.Completion, tokenizer: _Tokenizer
) -> Iterator[Position]:
  """Yields what is told of new tokens."""
  for token, logprob, at in itertools.zip_longest(
    delta.token_ids, delta.logprobs, delta.told
  ):
    others = _pairs(at, None, tokenizer) if at is not None else []
    yield Position(_bytes(token, tokenizer), _number(logprob), others)


def of_prompt(
  ids: tuple[int, ...],
  told: types.Told | None,
  num_top: int,
  tokenizer: _Tokenizer,
) -> Iterator[Position]:
  """Yields what is told of a prompt, of as many of the likeliest tokens.

  Its tokens alone, where `told` is None: it was not read to its end.
  """
  if told is None:
    for token in ids:
      yield Position(_bytes(token, tokenizer), None, [])
    return
  yield Position(_bytes(ids[0], tokenizer), None, [])
  for token, at in zip(ids[1:], told, strict=True):
    yield Position(
      _bytes(token, tokenizer),
      _number(at.logprob),
      _pairs(at, num_top, tokenizer),
    )


def prompt_logprobs(
  told: types.Told, num_top: int, tokenizer: _Tokenizer
) -> list[dict[str, Any] | None]:
  """Returns vLLM's field of this name."""
  return [
    None,
    *(
      {
        str(token): {
          'logprob': _number(logprob),
          'rank': rank,
          'decoded_token': text(_bytes(token, tokenizer)),
        }
        for token, logprob, rank in zip(
          at.token_ids[: 1 + num_top],
          at.logprobs,
          (at.rank, *range(1, 1 + num_top)),
          strict=False,
        )
      }
      for at in told
    ),
  ]


def text(token: bytes) -> str:
  """Returns a token as text, if need be with replacement characters."""
  return token.decode(errors='replace')


def _pairs(
  at: types.TokenLogprobs, num: int | None, tokenizer: _Tokenizer
) -> list[tuple[bytes, float]]:
  stop = None if num is None else 1 + num
  ids: Iterable[int] = dict.fromkeys(at.token_ids[1:stop])
  logprobs = dict(zip(at.token_ids, at.logprobs, strict=True))
  return [(_bytes(i, tokenizer), _number(logprobs[i])) for i in ids]


def _bytes(token: int, tokenizer: _Tokenizer) -> bytes:
  return str(token).encode() if tokenizer is None else tokenizer.bytes_of(token)


def _number(logprob: float) -> float:
  return max(logprob, types.LEAST_LOGPROB)
