# SPDX-License-Identifier: Apache-2.0
"""Makes lines of a file of prompts into requests. No JAX."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import functools
import json
import random
from typing import Any, NamedTuple

from sarathi_jax import errors
from sarathi_jax import types
from sarathi_jax.engine import engine as engine_lib
from sarathi_jax.text import tokenizer as tokenizer_lib

_KEYS = {'request_id', 'prompt', 'prompt_token_ids', 'messages', 'sampling'}
# The largest seed drawn here. It never changes, so that results repeat.
_MAX_DRAWN_SEED = 2**31 - 1
_PROMPT_KEYS = ('prompt', 'prompt_token_ids', 'messages')


class Line(NamedTuple):
  """A line of the input: a request, or what is wrong with it."""

  number: int  # from 1
  request_id: str | int  # as it is given
  request: types.Request | None
  error: str | None


def parse_line(
  number: int,
  text: bytes,
  defaults: Mapping[str, Any],
  seed: int,
  engine: engine_lib.Engine,
) -> Line:
  """Makes a request of a line, or says what is wrong with it."""
  request_id: str | int = f'line-{number}'
  try:
    fields = _decode(text)
    given_id = fields.get('request_id', request_id)
    if type(given_id) not in (str, int) or given_id == '':
      raise errors.InvalidRequestError(
        f'request_id={errors.shown(given_id)}: must be a text that is not '
        'empty, or an integer.'
      )
    request_id = given_id
    request = types.Request(
      request_id=str(request_id),
      prompt_token_ids=_prompt(fields, engine),
      sampling=_sampling(
        fields,
        functools.partial(engine.info.sampling, defaults=defaults),
        f'{seed} {str(request_id)!r}',
      ),
      arrival_time=engine.clock(),
    )
    engine.check(request)
  except errors.InvalidRequestError as error:
    return Line(number, request_id, None, str(error))
  return Line(number, request_id, request, None)


def _decode(text: bytes) -> dict[str, Any]:
  try:
    fields = json.loads(text.decode('utf-8-sig'))
  except UnicodeDecodeError as error:
    raise errors.InvalidRequestError(f'not UTF-8: {error}.') from error
  except (ValueError, RecursionError) as error:
    raise errors.InvalidRequestError(f'not JSON: {error}.') from error
  if not isinstance(fields, dict):
    raise errors.InvalidRequestError('must be a JSON object.')
  if unknown := fields.keys() - _KEYS:
    raise errors.InvalidRequestError(
      f'{errors.cut(min(unknown))}: unknown key; known: '
      f'{", ".join(sorted(_KEYS))}.'
    )
  return fields


def _sampling(
  fields: Mapping[str, Any],
  make: Callable[[Mapping[str, Any]], types.SamplingParams],
  seed: str,
) -> types.SamplingParams:
  given = fields.get('sampling')
  if not isinstance(given, dict | None):
    raise errors.InvalidRequestError(
      f'sampling={errors.shown(given)}: must be an object of sampling fields.'
    )
  sampling = make(given or {})
  if sampling.seed is not None:
    return sampling
  return dataclasses.replace(
    sampling, seed=random.Random(seed).randint(0, _MAX_DRAWN_SEED)
  )


def _prompt(
  fields: Mapping[str, Any], engine: engine_lib.Engine
) -> tuple[int, ...]:
  keys = [key for key in _PROMPT_KEYS if key in fields]
  if len(keys) != 1:
    raise errors.InvalidRequestError(
      f'must have one of {", ".join(_PROMPT_KEYS)}; has '
      f'{", ".join(keys) or "none"}.'
    )
  key, value = keys[0], fields[keys[0]]
  is_right, rule = {
    'prompt': (isinstance(value, str), 'a text'),
    'prompt_token_ids': (_are_all(int, value), 'a list of integers'),
    'messages': (
      _are_all(dict, value) and value,
      'a list of objects with role and content',
    ),
  }[key]
  if not is_right:
    raise errors.InvalidRequestError(
      f'{key}={errors.shown(value)}: must be {rule}.'
    )
  return tokenizer_lib.encode_prompt(engine.tokenizer, value)


def _are_all(kind: type, values: Any) -> bool:
  return isinstance(values, list) and all(type(v) is kind for v in values)
