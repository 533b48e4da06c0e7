# SPDX-License-Identifier: Apache-2.0
"""OpenAI's chat completions."""

from __future__ import annotations

from collections.abc import Mapping
import itertools
from typing import Any

from sarathi_jax import errors
from sarathi_jax import types
from sarathi_jax.engine import engine as engine_lib
from sarathi_jax.server.guard import limits as limits_lib
from sarathi_jax.server.http import fields
from sarathi_jax.server.http import forms
from sarathi_jax.server.http import told
from sarathi_jax.text import chats
from sarathi_jax.text import replies

FIELDS: Mapping[str, fields.Kind] = {
  'chat_template_kwargs': fields.OBJECT,
  'logprobs': fields.FLAG,
  'messages': fields.ANY,
  'parallel_tool_calls': fields.FLAG,
  'tool_choice': fields.ANY,
  'tools': fields.LIST,
  'top_logprobs': fields.LOGPROBS,
}
_CHAT = (
  'chat_template_kwargs',
  'parallel_tool_calls',
  'tool_choice',
  'tools',
)
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
  'add_special_tokens': (False,),  # templates write them
  'echo': (False,),
}
# Those that templates read. Others say nothing if they are null or empty, as
# OpenAI's client writes them into messages that it got.
_MESSAGE = (
  'content',
  'name',
  'reasoning',
  'reasoning_content',
  'role',
  'tool_call_id',
  'tool_calls',
)
_PART = ('refusal', 'text', 'type')


def read(
  body: Mapping[str, Any],
  info: engine_lib.EngineInfo,
  limits: limits_lib.Limits,
) -> forms.Call:
  """Reads a body; any thread.

  Raises:
    InvalidRequestError: it asks for what we don't do, or do not know.
  """
  # Unless it says how much, an answer has all that the context has room for.
  defaults = {'max_tokens': None, **info.default_sampling}
  asked, own = fields.read(body, FIELDS, info, defaults, NEUTRAL)
  logprobs = own.get('logprobs', False)
  asked = forms.with_logprobs(asked, own.get('top_logprobs'))
  if 'top_logprobs' in own and not logprobs:
    raise errors.InvalidRequestError(
      f'top_logprobs={own["top_logprobs"]}: needs logprobs=true.'
    )
  return forms.Call(
    asked,
    (chat_of(own, limits),),
    logprobs or asked.sampling.tells,
    prompt_logprobs=asked.sampling.prompt_logprobs,
  )


def chat_of(own: Mapping[str, Any], limits: limits_lib.Limits) -> chats.Chat:
  """Returns the chat that a body has.

  Raises:
    InvalidRequestError: it has none, or what no template reads.
  """
  limits.check('max_tools', len(own.get('tools', ())), 'tools')
  return chats.Chat(
    messages=messages_of(own.get('messages'), limits),
    **{name: own[name] for name in _CHAT if name in own},
  )


def messages_of(value: Any, limits: limits_lib.Limits) -> list[dict[str, Any]]:
  """Returns the messages of a body, without what says nothing.

  Raises:
    InvalidRequestError: they are none, or have what no template reads.
  """
  if not isinstance(value, list) or not value:
    raise errors.InvalidRequestError(
      f'messages={errors.shown(value)}: must be a list of messages, not empty.'
    )
  limits.check('max_messages', len(value), 'messages')
  return [_message(m, f'messages[{i}]') for i, m in enumerate(value)]


def _message(message: Any, where: str) -> dict[str, Any]:
  if not isinstance(message, dict):
    raise errors.InvalidRequestError(
      f'{where}={errors.shown(message)}: must be an object with role and '
      'content.'
    )
  kept = {}
  for name, value in message.items():
    if name in _MESSAGE:
      if value is not None or name == 'content':
        kept[name] = value
    elif value not in (None, [], ''):
      _refuse(f'{where}.{errors.cut(name)}', value)
  content = message.get('content')
  if isinstance(content, list):
    for i, part in enumerate(content):
      for name, value in part.items() if isinstance(part, dict) else ():
        if name not in _PART and value is not None:
          _refuse(f'{where}.content[{i}].{errors.cut(name)}', value)
  return kept


def _refuse(where: str, value: Any) -> None:
  raise errors.UnsupportedError(
    f'{where}={errors.shown(value)}: is not supported.'
  )


def _text(reply: types.Reply, is_piece: bool, is_first: bool) -> dict[str, Any]:
  if is_piece:
    return {'delta': replies.delta(reply, is_first)}
  return {'message': {**replies.message(reply), 'refusal': None}}


def _logprobs(
  positions: list[told.Position], num_before: int
) -> dict[str, Any]:
  del num_before
  return {
    'content': [
      {
        **_token(at.token, at.logprob),
        'top_logprobs': list(itertools.starmap(_token, at.others)),
      }
      for at in positions
    ],
    'refusal': None,
  }


def _token(token: bytes, logprob: float | None) -> dict[str, Any]:
  return {
    'token': told.text(token),
    'logprob': logprob,
    'bytes': list(token),
  }


FORM = forms.Form(
  'openai.chat',
  '/v1/chat/completions',
  'chatcmpl-',
  'chat.completion',
  'chat.completion.chunk',
  read,
  _text,
  _logprobs,
  has_prompt_by_choice=False,
)
