# SPDX-License-Identifier: Apache-2.0
"""The fields of a body: what they ask for, or an error that names them.

Every field is in one of these tables, or is refused: `OWN`, which we read here;
a form's own (`completions`, `chat`); `NOT_DONE`, which may only say what is so
anyway; and `sampling_params`' tables, which are read as they are, so that what
the engine learns to do is done here, too. Nothing is ignored, but null, which
says nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from sarathi_jax import config as config_lib
from sarathi_jax import errors
from sarathi_jax import sampling_params
from sarathi_jax import types
from sarathi_jax.engine import engine as engine_lib
from sarathi_jax.server.http import response_format


class Kind(NamedTuple):
  """What the values of a field are."""

  rule: str
  holds: Callable[[Any], bool]


FLAG = Kind('must be true or false', lambda v: isinstance(v, bool))
TEXT = Kind('must be a text', lambda v: isinstance(v, str))
_LOGPROBS = sampling_params.FIELDS['logprobs']
LOGPROBS = Kind(_LOGPROBS.rule, _LOGPROBS.holds)
_COUNT = Kind(
  'must be an integer >= 1', lambda v: config_lib.is_int(v) and v >= 1
)
_INT32 = Kind(
  'must be an integer of 32 bits',
  lambda v: config_lib.is_int(v) and -(2**31) <= v < 2**31,
)
LIST = Kind('must be a list', lambda v: isinstance(v, list))
OBJECT = Kind('must be an object', lambda v: isinstance(v, dict))
ANY = Kind('', lambda v: True)  # its reader checks it

# What every form reads itself.
OWN: Mapping[str, Kind] = {
  'cache_salt': TEXT,  # vLLM's
  'max_completion_tokens': _COUNT,  # max_tokens by its newer name
  'model': TEXT,
  'priority': _INT32,
  'response_format': OBJECT,
  'return_token_ids': FLAG,  # vLLM's
  'stream': FLAG,
  'stream_options': OBJECT,
  'tier': TEXT,
  'user': TEXT,
}
_STREAM_OPTIONS: Mapping[str, Kind] = {'include_usage': FLAG}
# As `NOT_DONE`, of these: OpenAI's, and vLLM's.
_NO_STREAM_OPTIONS: Mapping[str, tuple[Any, ...]] = {
  'include_obfuscation': (False,),
  'continuous_usage_stats': (False,),
}
# What OpenAI and vLLM know and we don't do -> the values at which it changes
# nothing. Those of `sampling_params` that are here would change the form of an
# answer: to honour them there is not enough.
NOT_DONE: Mapping[str, tuple[Any, ...]] = {
  'add_generation_prompt': (True,),
  'audio': (),
  'chat_template': (),
  'continue_final_message': (False,),
  'detokenize': (True,),
  'documents': ([],),
  'flat_logprobs': (False,),
  'function_call': ('none', 'auto'),
  'functions': ([],),
  'length_penalty': (1, 1.0),
  'metadata': ({},),
  'modalities': (['text'],),
  'output_kind': (),
  'prediction': (),
  'prompt_cache_key': (),
  'reasoning_effort': (),
  'return_tokens_as_token_ids': (False,),
  'safety_identifier': (),
  'service_tier': ('auto', 'default'),
  'store': (False,),
  'use_beam_search': (False,),
  'verbosity': (),
  'web_search_options': (),
}

# What vLLM called otherwise once -> what it is called now.
_RENAMED: Mapping[str, str] = {
  f'guided_{name}': f'structured_outputs.{name}'
  for name in ('json', 'regex', 'choice', 'grammar', 'whitespace_pattern')
}


class Asked(NamedTuple):
  """What a body asks for, but for its prompts and how it is answered.

  Attributes:
    sampling: how to choose the tokens.
    stream: whether to answer with events.
    include_usage: whether the last event has the usage.
    token_ids: whether the answer has the token ids of prompts and output.
    user: who the client calls for.
    priority, tier, cache_salt: see `types.Request`.
    adapter: the name of one, which is then the model's; None for the model.
  """

  sampling: types.SamplingParams
  stream: bool
  include_usage: bool
  token_ids: bool
  user: str
  priority: int
  tier: str
  cache_salt: str
  adapter: str | None


def read(
  body: Mapping[str, Any],
  form: Mapping[str, Kind],
  info: engine_lib.EngineInfo,
  defaults: Mapping[str, Any],
  neutral: Mapping[str, tuple[Any, ...]],
) -> tuple[Asked, dict[str, Any]]:
  """Reads the fields of a body.

  Args:
    body: the body.
    form: the fields of its form.
    info: what is served.
    defaults: of sampling fields, where the form has others than the engine.
    neutral: as `NOT_DONE`, of the form.

  Returns:
    What it asks for, and the fields of `form` that it has.

  Raises:
    InvalidRequestError: it asks for what we don't do, or do not know.
    NotFoundError: it names a model that is not here.
  """
  known = {**OWN, **form}
  own: dict[str, Any] = {}
  sampling: dict[str, Any] = {}
  for name, value in body.items():
    if name in known:
      if value is not None:
        check(name, value, known[name])
        own[name] = value
    elif name in neutral or name in NOT_DONE:
      _check_neutral(name, value, neutral.get(name, NOT_DONE.get(name, ())))
    elif name in sampling_params.FIELDS or name in sampling_params.UNSUPPORTED:
      if value is not None:
        sampling[name] = value
    elif name in _RENAMED:
      raise errors.UnsupportedError(
        f'{name}={errors.shown(value)}: is now called {_RENAMED[name]}.'
      )
    else:
      raise unknown(name, value)
  adapter = adapter_of(own.get('model'), info)
  if 'max_completion_tokens' in own:
    _check_once(body, 'max_tokens', 'max_completion_tokens')
    sampling['max_tokens'] = own['max_completion_tokens']
  if 'response_format' in own:
    outputs = response_format.read(own['response_format'])
    if outputs is not None and 'structured_outputs' in sampling:
      raise errors.InvalidRequestError(
        f'response_format={errors.shown(own["response_format"])}: excludes '
        'structured_outputs.'
      )
    sampling['structured_outputs'] = outputs or sampling.get(
      'structured_outputs'
    )
  stream = own.get('stream', False)
  options = own.get('stream_options', {})
  if options and not stream:
    raise errors.InvalidRequestError(
      f'stream_options={errors.shown(options)}: needs stream=true.'
    )
  for name, value in options.items():
    where = f'stream_options.{name}'
    if name in _NO_STREAM_OPTIONS:
      _check_neutral(where, value, _NO_STREAM_OPTIONS[name])
    elif name not in _STREAM_OPTIONS:
      raise unknown(where, value)
    elif value is not None:
      check(where, value, _STREAM_OPTIONS[name])
  return Asked(
    info.sampling(sampling, defaults),
    stream,
    bool(options.get('include_usage')),
    own.get('return_token_ids', False),
    own.get('user', ''),
    own.get('priority', 0),
    own.get('tier', types.TIERS[0]),
    own.get('cache_salt', ''),
    adapter,
  ), {name: value for name, value in own.items() if name in form}


def only(body: Mapping[str, Any], known: Mapping[str, Kind]) -> dict[str, Any]:
  """Returns the fields of a body that has no others; null is not said."""
  own = {}
  for name, value in body.items():
    if name not in known:
      raise unknown(name, value)
    if value is not None:
      check(name, value, known[name])
      own[name] = value
  return own


def check(name: str, value: Any, kind: Kind) -> None:
  """Raises InvalidRequestError if a value is not of its kind."""
  if not kind.holds(value):
    raise errors.InvalidRequestError(
      f'{name}={errors.shown(value)}: {kind.rule}.'
    )


def unknown(name: str, value: Any) -> errors.UnsupportedError:
  """Makes the error for a field that is in no table."""
  return errors.UnsupportedError(
    f'{errors.cut(name)}={errors.shown(value)}: this server does not know this '
    'field.'
  )


def adapter_of(name: str | None, info: engine_lib.EngineInfo) -> str | None:
  """Returns the adapter that a model's name means; None for the model itself.

  Raises:
    NotFoundError: neither has this name; None is the model.
  """
  if name in info.adapters:
    return name
  if name not in (None, info.model_name):
    served = ', '.join(map(repr, (info.model_name, *info.adapters)))
    raise errors.NotFoundError(
      f'model={errors.shown(name)}: is not served here; {served} '
      f'{"are" if info.adapters else "is"}.'
    )
  return None


def is_token_ids(value: Any) -> bool:
  """Whether a value is a list of integers; which are known, is not asked."""
  return isinstance(value, list) and set(map(type, value)) == {int}


def _check_neutral(name: str, value: Any, values: tuple[Any, ...]) -> None:
  if value is not None and not any(
    type(value) is type(v) and value == v for v in values
  ):
    raise errors.UnsupportedError(
      f'{name}={errors.shown(value)}: is not supported.'
    )


def _check_once(body: Mapping[str, Any], name: str, newer: str) -> None:
  if body.get(name) not in (None, body[newer]):
    raise errors.InvalidRequestError(
      f'{newer}={errors.shown(body[newer])}: differs from '
      f'{name}={errors.shown(body[name])}, which is the same.'
    )
