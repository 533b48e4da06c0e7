# SPDX-License-Identifier: Apache-2.0
"""What the forms of generation, chats and completions, have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from sarathi_jax import errors
from sarathi_jax import types
from sarathi_jax.engine import engine as engine_lib
from sarathi_jax.server.guard import limits as limits_lib
from sarathi_jax.server.http import fields
from sarathi_jax.text import tokenizer as tokenizer_lib

_LEAST_LOGPROB = -9999.0  # as vLLM: JSON has no infinity


class Call(NamedTuple):
  """What a body asks for.

  Attributes:
    asked: how.
    prompts: what to continue, each to a choice of its own.
    logprobs: whether to tell log-probabilities of the sampled tokens.
    echo: whether the text begins with the prompt's.
  """

  asked: fields.Asked
  prompts: tuple[tokenizer_lib.Prompt, ...]
  logprobs: bool
  echo: bool = False


class Form(NamedTuple):
  """How a form says what the others say as well.

  Attributes:
    protocol: its name, for metrics and logs.
    path: where it is served.
    prefix: of ids.
    whole, piece: the `object` of a response, and of an event.
    read: makes a call of a body. InvalidRequestError: it can't be served.
    text: a choice's text: as a whole, or as one piece of it, maybe the first.
    logprobs: of tokens, given their bytes and how long the text before was.
    has_prompt_ids_by_choice: where the token ids of prompts are told.
  """

  protocol: str
  path: str
  prefix: str
  whole: str
  piece: str
  read: Callable[
    [Mapping[str, Any], engine_lib.EngineInfo, limits_lib.Limits], Call
  ]
  text: Callable[[str, bool, bool], dict[str, Any]]
  logprobs: Callable[[list[tuple[bytes, float]], int], dict[str, Any]]
  has_prompt_ids_by_choice: bool


def scored(
  delta: types.OutputDelta | types.Completion,
  tokenizer: tokenizer_lib.Tokenizer | None,
) -> list[tuple[bytes, float]]:
  """Returns the bytes and the log-probability of each token."""
  return [
    (
      str(token).encode() if tokenizer is None else tokenizer.bytes_of(token),
      max(logprob, _LEAST_LOGPROB),
    )
    for token, logprob in zip(delta.token_ids, delta.logprobs, strict=True)
  ]


def check_sampled_alone(name: str, num: int | None) -> None:
  """Refuses to tell of other tokens than the sampled ones."""
  if num:
    raise errors.UnsupportedError(
      f"{name}={errors.shown(num)}: only the sampled tokens' "
      f'log-probabilities are returned ({name}=0).'
    )
