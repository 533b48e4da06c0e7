# SPDX-License-Identifier: Apache-2.0
"""Turns a prompt into token ids, within the server's limits; any thread.

Imports no gRPC and no JAX.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sarathi_jax import errors
from sarathi_jax import types
from sarathi_jax.engine import engine as engine_lib
from sarathi_jax.server.queue import admission
from sarathi_jax.text import chats
from sarathi_jax.text import prompts as prompts_lib

Prompt = prompts_lib.Prompt


def prepare(
  engine: engine_lib.Engine,
  prompt: Prompt,
  draft: types.Request,
  limits: admission.Limits,
) -> types.Request:
  """Tokenizes a prompt and checks the request.

  Raises:
    InvalidRequestError: the request can't be served.
  """
  max_model_len = engine.info.max_model_len
  check_size(prompt, limits, max_model_len)
  request = prompts_lib.with_prompt(draft, engine.tokenizer, prompt)
  limits.check_sampling(request.sampling)  # as tools make more of it
  limits.check_prompt_tokens(len(request.prompt_token_ids), max_model_len)
  limits.check_n_tokens(request)
  limits.check_prompt_logprobs(request)
  room = max_model_len - len(request.prompt_token_ids)
  request = limits.ended(request, room)
  engine.check(request)
  return engine.prepared(request)


def check_size(
  prompt: Prompt, limits: admission.Limits, max_model_len: int
) -> None:
  """Refuses a prompt that must not even be tokenized.

  Raises:
    InvalidRequestError: it is empty, or too long.
  """
  parts = prompt.messages if isinstance(prompt, chats.Chat) else prompt
  if not len(parts):  # else a tokenizer may make a lone BOS of it
    raise errors.InvalidRequestError(f'prompt={parts!r}: must not be empty.')
  if prompts_lib.is_chat(prompt):
    limits.check('max_messages', len(parts), 'chat')
  elif not isinstance(prompt, str):
    limits.check_prompt_tokens(len(parts), max_model_len)
    return
  if isinstance(prompt, chats.Chat):
    for name in ('tools', 'chat_template_kwargs'):
      num, levels = _measured(getattr(prompt, name))
      limits.check('max_tool_chars', num, name)
      limits.check('max_tool_levels', levels, name)
  limits.check_prompt_chars(num_chars(prompt), max_model_len)


def num_chars(prompt: Prompt) -> int:
  """Counts the characters of a text or of a chat, and ids as one each."""
  if isinstance(prompt, chats.Chat):
    more = (prompt.offered, prompt.chat_template_kwargs)
    return num_chars(prompt.messages) + sum(_measured(m)[0] for m in more)
  if not prompts_lib.is_chat(prompt):
    return len(prompt)
  num, parts = 0, [prompt]
  while parts:  # of any JSON that messages have
    part: Any = parts.pop()
    if isinstance(part, str):
      num += len(part)
    elif isinstance(part, Mapping):
      parts.extend(part.values())
    elif isinstance(part, (list, tuple)):
      parts.extend(part)
  return num


def _measured(value: Any) -> tuple[int, int]:
  """Counts the characters of JSON, with its keys, and its levels."""
  num, levels, parts = 0, 0, [value]
  while parts:  # those of a level
    levels += 1
    num += sum(len(part) for part in parts if isinstance(part, str))
    inner: list[Any] = []
    for part in parts:
      if isinstance(part, Mapping):
        inner += [*part.keys(), *part.values()]
      elif isinstance(part, (list, tuple)):
        inner += part
    parts = inner
  return num, levels
