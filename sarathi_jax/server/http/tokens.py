# SPDX-License-Identifier: Apache-2.0
"""Text to token ids and back, as vLLM's /tokenize and /detokenize."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sarathi_jax import errors
from sarathi_jax.engine import checks
from sarathi_jax.engine import engine as engine_lib
from sarathi_jax.server import frontend as frontend_lib
from sarathi_jax.server import prompts
from sarathi_jax.server.guard import limits as limits_lib
from sarathi_jax.server.http import chat
from sarathi_jax.server.http import exchange as exchange_lib
from sarathi_jax.server.http import fields
from sarathi_jax.server.protocols import messages
from sarathi_jax.text import tokenizer as tokenizer_lib

_TOKEN_CHARS = 16  # of a token in a response, its id and its text
_TOKENIZE: Mapping[str, fields.Kind] = {
  'add_special_tokens': fields.FLAG,
  'chat_template_kwargs': fields.OBJECT,
  'messages': fields.ANY,
  'model': fields.TEXT,
  'prompt': fields.TEXT,
  'return_token_strs': fields.FLAG,
  'tools': fields.LIST,
}
_DETOKENIZE: Mapping[str, fields.Kind] = {
  'model': fields.TEXT,
  'tokens': fields.ANY,
}


async def tokenize(
  frontend: frontend_lib.Frontend, exchange: exchange_lib.Exchange
) -> None:
  """Answers with the token ids of a prompt, or of a chat as it is laid out.

  Raises:
    HttpError, SarathiError: it can't.
  """
  await _answer(
    frontend,
    exchange,
    lambda body: _tokens(body, frontend.engine, frontend.limits),
  )


def _tokens(
  body: Mapping[str, Any],
  engine: engine_lib.Engine,
  limits: limits_lib.Limits,
) -> dict[str, Any]:
  own = _read(body, _TOKENIZE, engine)
  if ('prompt' in own) == ('messages' in own):
    raise errors.InvalidRequestError(
      'prompt: one of prompt, messages must be set.'
    )
  tokenizer = _tokenizer(engine)

  def check(num: int) -> None:
    limits.check_counted(num, engine.info.max_model_len)

  if 'messages' in own:
    if 'add_special_tokens' in own:
      raise errors.InvalidRequestError(
        'add_special_tokens: is for a prompt; of a chat, the template writes '
        'them.'
      )
    asked = chat.chat_of(own, limits)
    prompts.check_size(asked, limits, engine.info.max_model_len)
    ids = tokenizer.apply_chat_template(asked, check)
  else:
    for name in ('chat_template_kwargs', 'tools'):
      if name in own:
        raise errors.InvalidRequestError(f'{name}: is for messages.')
    prompts.check_size(own['prompt'], limits, engine.info.max_model_len)
    ids = tokenizer.encode(
      own['prompt'], own.get('add_special_tokens', True), check
    )
  answer: dict[str, Any] = {
    'count': len(ids),
    'max_model_len': engine.info.max_model_len,
    'tokens': ids,
  }
  if own.get('return_token_strs'):
    answer['token_strs'] = [
      tokenizer.bytes_of(token).decode(errors='replace') for token in ids
    ]
  return answer


async def detokenize(
  frontend: frontend_lib.Frontend, exchange: exchange_lib.Exchange
) -> None:
  """Answers with the text of token ids.

  Raises:
    HttpError, SarathiError: it can't.
  """
  await _answer(
    frontend,
    exchange,
    lambda body: _text(body, frontend.engine, frontend.limits),
  )


def _text(
  body: Mapping[str, Any],
  engine: engine_lib.Engine,
  limits: limits_lib.Limits,
) -> dict[str, Any]:
  ids: Any = _read(body, _DETOKENIZE, engine).get('tokens')
  most = engine.info.max_model_len
  if isinstance(ids, list) and len(ids) > most:
    raise errors.InvalidRequestError(
      f'tokens: has {len(ids):,}: must be at most max_model_len={most}.'
    )
  if ids != [] and not fields.is_token_ids(ids):
    raise errors.InvalidRequestError(
      f'tokens={errors.shown(ids)}: must be a list of token ids.'
    )
  checks.check_known('tokens', ids, engine.info.vocab_size)
  text = _tokenizer(engine).decode(ids, skip_special_tokens=False)
  limits.check_prompt_chars(len(text), engine.info.max_model_len)
  return {'prompt': text}


async def _answer(
  frontend: frontend_lib.Frontend,
  exchange: exchange_lib.Exchange,
  compute: Callable[[Mapping[str, Any]], dict[str, Any]],
) -> None:
  """Answers with what is computed of the body; beside the loop, if large."""
  body, size = await exchange.read(frontend.limits)

  def make() -> bytes:
    made = compute(body)
    size = _TOKEN_CHARS * len(made.get('tokens', ()))
    return exchange_lib.encode(made, size)

  await exchange.reply_bytes(await messages.read(size, make))


def _read(
  body: Mapping[str, Any],
  known: Mapping[str, fields.Kind],
  engine: engine_lib.Engine,
) -> dict[str, Any]:
  own = fields.only(body, known)
  fields.adapter_of(own.get('model'), engine.info)  # or there is none
  return own


def _tokenizer(engine: engine_lib.Engine) -> tokenizer_lib.Tokenizer:
  if engine.tokenizer is None:
    raise errors.UnsupportedError('prompt: this model has no tokenizer.')
  return engine.tokenizer
