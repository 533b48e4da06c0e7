# SPDX-License-Identifier: Apache-2.0
"""What the forms of generation, chats and completions, have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any, NamedTuple

from sarathi_jax import types
from sarathi_jax.engine import engine as engine_lib
from sarathi_jax.server.guard import limits as limits_lib
from sarathi_jax.server.http import fields
from sarathi_jax.server.http import told
from sarathi_jax.text import tokenizer as tokenizer_lib


class Call(NamedTuple):
  """What a body asks for.

  Attributes:
    asked: how.
    prompts: what to continue, each to a choice of its own.
    logprobs: whether to tell log-probabilities of the sampled tokens.
    echo: whether the text begins with the prompt's.
    prompt_logprobs: of how many of the likeliest tokens to tell at each place
      of the prompt, in a field of its own; None for no such field.
    has_output: whether the answer has what is generated, which at least one
      token is.
  """

  asked: fields.Asked
  prompts: tuple[tokenizer_lib.Prompt, ...]
  logprobs: bool
  echo: bool = False
  prompt_logprobs: int | None = None
  has_output: bool = True


class Form(NamedTuple):
  """How a form says what the others say as well.

  Attributes:
    protocol: its name, for metrics and logs.
    path: where it is served.
    prefix: of ids.
    whole, piece: the `object` of a response, and of an event.
    read: makes a call of a body. InvalidRequestError: it can't be served.
    text: what a choice says: as a whole, or as one piece of it, maybe the
      first.
    logprobs: of tokens, given how long the text before was.
    has_prompt_by_choice: whether what is told of prompts, beside their text,
      is told with each choice.
  """

  protocol: str
  path: str
  prefix: str
  whole: str
  piece: str
  read: Callable[
    [Mapping[str, Any], engine_lib.EngineInfo, limits_lib.Limits], Call
  ]
  text: Callable[[types.Reply, bool, bool], dict[str, Any]]
  logprobs: Callable[[list[told.Position], int], dict[str, Any]]
  has_prompt_by_choice: bool


def with_logprobs(asked: fields.Asked, num: int | None) -> fields.Asked:
  """Adds that so many of the likeliest tokens are told of; None or 0: none."""
  return asked._replace(
    sampling=dataclasses.replace(asked.sampling, logprobs=num or None)
  )
