# SPDX-License-Identifier: Apache-2.0
"""Makes an `LLM`'s requests of what its callers give."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import dataclasses
import itertools
from typing import Any

from sarathi_jax import errors
from sarathi_jax import types
from sarathi_jax.engine import engine as engine_lib
from sarathi_jax.in_process import prompts as prompts_lib
from sarathi_jax.text import chats as chats_lib
from sarathi_jax.text import prompts as text_prompts


def make(
  engine: engine_lib.Engine,
  ids: Iterator[int],
  prompts: Any,
  sampling: Any,
  adapter: Any,
) -> list[types.Request]:
  """Returns a request for each prompt.

  Args:
    engine: what is to serve them.
    ids: numbers that no other requests have.
    prompts, sampling, adapter: see `llm.LLM.generate`.

  Raises:
    InvalidRequestError: one can't be served; of several, its number is said.
  """
  prompts = prompts_lib.listed(prompts)
  if sampling is None or isinstance(sampling, types.SamplingParams):
    sampling = [sampling or engine.info.sampling({})] * len(prompts)
  if not isinstance(sampling, (list, tuple)) or not all(
    isinstance(params, types.SamplingParams) for params in sampling
  ):
    raise errors.InvalidRequestError(
      f'sampling={errors.shown(sampling)}: must be SamplingParams, or a list '
      'of them; SamplingParams.from_dict makes them of an object.'
    )
  if not isinstance(adapter, (list, tuple)):
    adapter = [adapter] * len(prompts)
  for name, values in (('sampling', sampling), ('adapter', adapter)):
    if len(values) != len(prompts):
      raise errors.InvalidRequestError(
        f'{name}: {len(values)} for {len(prompts)} prompts; must be one '
        'for all, or one each.'
      )
  now = engine.clock()
  requests = [
    text_prompts.with_prompt(
      types.Request(
        request_id=f'llm-{next(ids)}',
        sampling=params,
        prompt_token_ids=(),
        arrival_time=now,
        adapter=engine.adapters.find(name),
      ),
      engine.tokenizer,
      prompt,
    )
    for prompt, params, name in zip(prompts, sampling, adapter, strict=True)
  ]
  for index, request in enumerate(requests):
    try:
      engine.check(request)
    except errors.InvalidRequestError as error:
      if len(requests) == 1:
        raise
      raise type(error)(f'prompts[{index}]: {error}') from error
  return requests


def with_replies(
  engine: engine_lib.Engine,
  chats: Sequence[chats_lib.Chat],
  completions: Sequence[types.Completion],
) -> list[types.Completion]:
  """Returns the completions of chats with what their texts say, told apart.

  Args:
    engine: what served them.
    chats: in order.
    completions: of each, in order.
  """
  tokenizer = engine.tokenizer
  assert tokenizer is not None  # or there were no chats

  def reply(chat: chats_lib.Chat, done: types.Completion) -> types.Reply:
    reader = tokenizer.reply_reader(chat, done.prompt_token_ids)
    if reader is None:
      return types.Reply(done.text)
    return reader.read(done.text, is_last=True)

  num_begun = itertools.accumulate(not done.index for done in completions)
  return [
    dataclasses.replace(done, reply=reply(chats[num - 1], done))
    for done, num in zip(completions, num_begun, strict=True)
  ]
