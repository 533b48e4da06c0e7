# SPDX-License-Identifier: Apache-2.0
"""Turns a prompt into token ids, within the server's limits; any thread.

Imports no gRPC and no JAX.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sarathi_jax import errors
from sarathi_jax import types
from sarathi_jax.engine import engine as engine_lib
from sarathi_jax.server.http import body
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
  request = prompts_lib.with_prompt(
    draft,
    engine.tokenizer,
    prompt,
    lambda num: limits.check_prompt_tokens(num, max_model_len),
  )
  limits.check_sampling(request.sampling)  # as tools make more of it
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
    messages: Any = parts
    _check_arguments(messages, limits)
  elif not isinstance(prompt, str):
    limits.check_prompt_tokens(len(parts), max_model_len)
    return
  if isinstance(prompt, chats.Chat):
    for name in ('tools', 'chat_template_kwargs'):
      measured = _measured(getattr(prompt, name))
      limits.check('max_tool_chars', measured.num_chars, name)
      limits.check('max_tool_levels', measured.num_levels, name)
  limits.check_prompt_chars(num_chars(prompt), max_model_len)


def _check_arguments(messages: Sequence[Any], limits: admission.Limits) -> None:
  """Refuses calls of tools whose JSON has too many parts to be read at once.

  Args:
    messages: as they came.
    limits: the bounds.
  """
  for i, message in enumerate(messages):
    calls = message.get('tool_calls') if isinstance(message, Mapping) else None
    for call in calls if isinstance(calls, (list, tuple)) else ():
      function = call.get('function') if isinstance(call, Mapping) else None
      if isinstance(function, Mapping):
        where = f'messages[{i}].tool_calls: arguments'
        arguments = function.get('arguments')
        if isinstance(arguments, str):
          body.check_parts(arguments, limits, where)
        else:
          limits.check('max_fields', _measured(arguments).num_plain, where)


def num_chars(prompt: Prompt) -> int:
  """Counts the characters of a text or of a chat, and ids as one each."""
  if isinstance(prompt, chats.Chat):
    more = (prompt.offered, prompt.chat_template_kwargs)
    return num_chars(prompt.messages) + sum(
      _measured(m).num_chars for m in more
    )
  if not prompts_lib.is_chat(prompt):
    return len(prompt)
  num = 0
  parts: list[Any] = []
  messages: Any = prompt
  for message in messages:  # whose own keys are nothing that one sizes
    parts += message.values() if isinstance(message, Mapping) else (message,)
  while parts:  # of any JSON that messages have
    part = parts.pop()
    if isinstance(part, str):
      num += len(part)
    elif isinstance(part, Mapping):
      num += sum(map(len, part))
      parts.extend(part.values())
    elif isinstance(part, (list, tuple)):
      parts.extend(part)
    else:
      num += len(str(part))
  return num


class _Measured(NamedTuple):
  """The size of some JSON.

  Attributes:
    num_chars: of texts, keys, numbers and so on.
    num_levels: of objects and lists, one in the other.
    num_plain: numbers, true, false and null.
  """

  num_chars: int
  num_levels: int
  num_plain: int


def _measured(value: Any) -> _Measured:
  num_chars = num_levels = num_plain = 0
  parts = [value]
  while parts:  # those of a level
    num_levels += 1
    inner: list[Any] = []
    for part in parts:
      if isinstance(part, str):
        num_chars += len(part)
      elif isinstance(part, Mapping):
        inner += [*part.keys(), *part.values()]
      elif isinstance(part, (list, tuple)):
        inner += part
      else:
        num_chars += len(str(part))
        num_plain += 1
    parts = inner
  return _Measured(num_chars, num_levels, num_plain)
