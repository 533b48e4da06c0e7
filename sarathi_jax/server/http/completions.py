# SPDX-License-Identifier: Apache-2.0
"""OpenAI's completions: texts or token ids, one prompt or several."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import itertools
from typing import Any

from sarathi_jax import errors
from sarathi_jax import types
from sarathi_jax.engine import engine as engine_lib
from sarathi_jax.server.guard import limits as limits_lib
from sarathi_jax.server.http import fields
from sarathi_jax.server.http import forms
from sarathi_jax.server.http import told
from sarathi_jax.text import tokenizer as tokenizer_lib

FIELDS: Mapping[str, fields.Kind] = {
  'echo': fields.FLAG,
  'logprobs': fields.LOGPROBS,
  'prompt': fields.ANY,
}
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
  'add_special_tokens': (True,),
  'chat_template_kwargs': ({},),
  'parallel_tool_calls': (True, False),
  'suffix': ('',),
  'tool_choice': ('none', 'auto'),
  'tools': ([],),
}


def read(
  body: Mapping[str, Any],
  info: engine_lib.EngineInfo,
  limits: limits_lib.Limits,
) -> forms.Call:
  """Reads a body; any thread.

  Raises:
    InvalidRequestError: it asks for what we don't do, or do not know.
  """
  # As in vLLM: what is generated all the same is not told.
  has_output = not (
    body.get('echo') is True
    and type(body.get('max_tokens')) is int
    and body['max_tokens'] == 0
  )
  asked, own = fields.read(
    body if has_output else {**body, 'max_tokens': 1}, FIELDS, info, {}, NEUTRAL
  )
  num, echo = own.get('logprobs'), own.get('echo', False)
  asked = forms.with_logprobs(asked, num)
  of_prompt = asked.sampling.prompt_logprobs
  tells = num is not None or asked.sampling.tells
  if echo and tells and asked.sampling.n > 1:
    raise errors.UnsupportedError(
      f'echo=True: with logprobs, n={asked.sampling.n} is not supported: '
      'log-probabilities of a prompt are told once.'
    )
  if echo and tells:
    sampling = dataclasses.replace(
      asked.sampling, prompt_logprobs=max(num or 0, of_prompt or 0)
    )
    asked = asked._replace(sampling=sampling)
  return forms.Call(
    asked,
    _prompts(own.get('prompt'), info, limits),
    tells,
    echo,
    of_prompt,
    has_output,
  )


def _prompts(
  prompt: Any, info: engine_lib.EngineInfo, limits: limits_lib.Limits
) -> tuple[tokenizer_lib.Prompt, ...]:
  def is_prompt(value: Any) -> bool:
    if isinstance(value, list):  # before each is looked at
      limits.check_prompt_tokens(len(value), info.max_model_len)
    return isinstance(value, str) or fields.is_token_ids(value)

  is_list = isinstance(prompt, list) and prompt and type(prompt[0]) is not int
  prompts = prompt if is_list else [prompt]
  limits.check('max_prompts', len(prompts), 'prompt')
  if all(map(is_prompt, prompts)):
    return tuple(prompts)
  raise errors.InvalidRequestError(
    f'prompt={errors.shown(prompt)}: must be a text or a list of token ids, or '
    'a list of these, not empty.'
  )


def _text(reply: types.Reply, is_piece: bool, is_first: bool) -> dict[str, Any]:
  del is_piece, is_first
  return {'text': reply.content}


def _logprobs(
  positions: list[told.Position], num_before: int
) -> dict[str, Any]:
  tokens = [told.text(at.token) for at in positions]
  return {
    'tokens': tokens,
    'token_logprobs': [at.logprob for at in positions],
    'top_logprobs': [
      None
      if at.logprob is None
      else {token: at.logprob}
      | {told.text(other): logprob for other, logprob in at.others}
      for token, at in zip(tokens, positions, strict=True)
    ],
    'text_offset': list(
      itertools.accumulate(map(len, tokens[:-1]), initial=num_before)
    )[: len(tokens)],
  }


FORM = forms.Form(
  'openai.completions',
  '/v1/completions',
  'cmpl-',
  'text_completion',
  'text_completion',
  read,
  _text,
  _logprobs,
  has_prompt_by_choice=True,
)
