# SPDX-License-Identifier: Apache-2.0
"""Makes requests of prompts: texts, token ids, chats."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import operator
from typing import Any

from sarathi_jax import errors
from sarathi_jax import types
from sarathi_jax.text import chats
from sarathi_jax.text import tokenizer as tokenizer_lib

Prompt = tokenizer_lib.Prompt


def checked(prompt: Any) -> Prompt:
  """Returns `prompt` if it may be one; its content is checked when encoded.

  Raises:
    InvalidRequestError: it is neither a text nor a list.
  """
  if isinstance(prompt, (str, chats.Chat)) or (
    isinstance(prompt, Sequence) and not isinstance(prompt, (bytes, bytearray))
  ):
    return prompt
  raise _wrong(prompt)


def _wrong(prompt: Any) -> errors.InvalidRequestError:
  return errors.InvalidRequestError(
    f'prompt={errors.shown(prompt)}: must be a text, a list of token ids, or a '
    'list of messages.'
  )


def with_prompt(
  request: types.Request,
  tokenizer: tokenizer_lib.Tokenizer | None,
  prompt: Prompt,
  check: Callable[[int], None] | None = None,
) -> types.Request:
  """Returns a request for the continuation of a prompt.

  Args:
    request: how to continue it.
    tokenizer: the model's, if it has one.
    prompt: what to continue.
    check: see `Tokenizer.encode`.

  Raises:
    InvalidRequestError: see `encode_prompt`; or it can't be asked for so.
  """
  request = dataclasses.replace(
    request, prompt_token_ids=encode_prompt(tokenizer, prompt, check)
  )
  if tokenizer is None:
    return request
  if isinstance(prompt, chats.Chat):
    return tokenizer.prepare(request, prompt)
  outputs = request.sampling.structured_outputs
  if outputs is not None and (outputs.AFTER_REASONING or is_chat(prompt)):
    return tokenizer.prepare(request)
  return request


def is_chat(prompt: Prompt) -> bool:
  """Whether a prompt is a chat, or a list of messages."""
  parts: Any = prompt
  return isinstance(prompt, chats.Chat) or (
    not isinstance(prompt, str)
    and len(prompt) > 0
    and isinstance(parts[0], Mapping)
  )


def encode_prompt(
  tokenizer: tokenizer_lib.Tokenizer | None,
  prompt: Prompt,
  check: Callable[[int], None] | None = None,
) -> tuple[int, ...]:
  """Returns the token ids of a text, of a chat, or of token ids.

  Raises:
    InvalidRequestError: it is none of these, or there is no tokenizer.
  """
  prompt = checked(prompt)
  has_messages = is_chat(prompt)
  if isinstance(prompt, str) or has_messages:
    if not prompt:
      # The tokenizer itself might add a token that starts a text.
      raise errors.InvalidRequestError("prompt='': must not be empty.")
    if tokenizer is None:
      raise errors.UnsupportedError(
        'prompt: this model has no tokenizer; send token ids.'
      )
    if has_messages:
      return tokenizer.apply_chat_template(prompt, check)  # type: ignore
    return tokenizer.encode(prompt, check=check)  # type: ignore
  ids: Any = prompt
  if any(isinstance(token, bool) for token in ids):
    raise _wrong(prompt)
  try:
    return tuple(map(operator.index, ids))
  except TypeError:
    raise _wrong(prompt) from None
