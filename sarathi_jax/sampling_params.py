# SPDX-License-Identifier: Apache-2.0
"""How to choose the tokens of a request: one table of fields. No JAX.

The class is the table. What else is to be known of a field, beside its name
and default, is its `Field`: what values it takes, its flag's help, whether
a checkpoint may recommend it, and what the device gets of it. From `FIELDS`
are made the checks, the flags, the tensors of the Open Inference Protocol, and
what is packed for the device. A field is added here, to the .proto, and where
it is honoured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import enum
from types import MappingProxyType
from typing import Any, NamedTuple

from sarathi_jax import config
from sarathi_jax import errors

MIN_SEED, MAX_SEED = -(2**63), 2**63 - 1  # vLLM's

# What vLLM's SamplingParams knows and we don't honour yet -> the value at
# which it changes nothing. Any other value, but None, is refused by name.
UNSUPPORTED: Mapping[str, Any] = {
  'allowed_token_ids': None,
  'bad_words': (),
  'detokenize': True,
  'extra_args': {},
  'flat_logprobs': False,
  'frequency_penalty': 0.0,
  'guided_decoding': None,
  'logit_bias': {},
  'logprob_token_ids': None,
  'logits_processors': None,
  'min_tokens': 0,
  'n': 1,
  'output_kind': None,
  'presence_penalty': 0.0,
  'prompt_logprobs': None,
  'repetition_detection': None,
  'repetition_penalty': 1.0,
  'spaces_between_special_tokens': True,
  'structured_outputs': None,
  'thinking_token_budget': None,
  'truncate_prompt_tokens': None,
}


class Kind(enum.Enum):
  """What the values of a field are."""

  INT = 'an integer of 32 bits'
  LONG = 'an integer of 64 bits'
  FLOAT = 'a real number'
  BOOL = 'true or false'
  STRINGS = 'a list of strings'
  IDS = 'a list of token ids'

  @property
  def is_list(self) -> bool:
    return self in (Kind.STRINGS, Kind.IDS)


class OnDevice(NamedTuple):
  """What the sampler on the device gets of a field, in 32 bits.

  Attributes:
    neutral: the value that asks for nothing, which rows have that nobody
      samples from.
    read: makes the device's value of the field's.
  """

  neutral: float
  read: Callable[[Any], Any] = lambda value: value


class Field(NamedTuple):
  """What there is to know of a field of `SamplingParams`.

  Attributes:
    kind: of its values.
    help: of its flag: a sentence.
    rule: what its values have to be.
    holds: whether a value is so.
    none_is_default: whether vLLM, or its HTTP, takes None for what is not
      said, and None says nothing itself.
    is_recommended: whether a checkpoint's makers may recommend a value.
    on_device: None where the device needs nothing of it.
  """

  kind: Kind
  help: str
  rule: str
  holds: Callable[[Any], bool]
  none_is_default: bool = False
  is_recommended: bool = False
  on_device: OnDevice | None = None


def _field(default: Any, *args: Any, **kwargs: Any) -> Any:
  return dataclasses.field(
    default=default, metadata={'field': Field(*args, **kwargs)}
  )


def _flag(default: bool, help: str) -> Any:
  return _field(
    default,
    Kind.BOOL,
    help,
    'must be true or false',
    lambda value: isinstance(value, bool),
  )


def _probability(
  default: float,
  help: str,
  rule: str,
  holds: Callable[[Any], bool],
  neutral: float,
) -> Any:
  """A number that the device gets, and that a checkpoint may recommend."""
  return _field(
    default,
    Kind.FLOAT,
    help,
    rule,
    holds,
    none_is_default=True,
    is_recommended=True,
    on_device=OnDevice(neutral),
  )


def _plain(value: Any) -> Any:
  """A scalar of NumPy or JAX as Python's; other things as they are."""
  is_scalar = getattr(value, 'ndim', None) == 0 and hasattr(value, 'item')
  return value.item() if is_scalar else value


def _listed(value: Any) -> Any:
  """A list, or an array of NumPy or JAX, as a tuple of plain values."""
  if getattr(value, 'ndim', None) == 1 and hasattr(value, 'tolist'):
    value = value.tolist()
  return (
    tuple(map(_plain, value)) if isinstance(value, (tuple, list)) else (value)
  )


_is_int, _is_real = config.is_int, config.is_real


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
  """How to choose the tokens of one request. Names and defaults are vLLM's.

  Where vLLM takes None for a value that is not said, so does this: it is the
  default. Scalars of NumPy and JAX are taken, and kept as Python's.

  Attributes:
    max_tokens: the most tokens to generate, >= 1; None for all that the
      context has room for.
    temperature: >= 0; 0 takes the likeliest token (greedy).
    top_k: sample among the k likeliest tokens; 0 or -1 for all.
    top_p: sample among the likeliest tokens that make up this probability,
      in (0, 1].
    min_p: drop tokens less likely than this fraction of the likeliest one,
      in [0, 1].
    seed: in [-2**63, 2**63); the same seed, prompt and weights give the same
      random numbers, whatever else runs. So they give the same tokens, but
      where rounding, which does depend on what else is in a step, decides
      between two that are nearly as likely: seldom with float32 weights,
      often enough to notice with 16 bits. None or, as in vLLM, -1: the engine
      draws one.
    stop: strings that end the output, which excludes them.
    stop_token_ids: tokens that end the output, which includes them.
    include_stop_str_in_output: keep the stop string at the end of the text.
    ignore_eos: go on past the end-of-sequence token.
    skip_special_tokens: leave special tokens out of the text.
    logprobs: None or 0. The log-probability of each sampled token is always
      returned; those of other tokens are not supported.
  """

  max_tokens: int | None = _field(
    16,
    Kind.INT,
    'The most tokens to generate.',
    'must be an integer >= 1',
    lambda n: n is None or (_is_int(n) and n >= 1),
  )
  temperature: float = _probability(
    1.0,
    'Temperature of sampling; 0 takes the likeliest token each time.',
    'must be finite and >= 0',
    lambda t: _is_real(t) and t >= 0,
    0.0,
  )
  top_k: int = _field(
    0,
    Kind.INT,
    'Sample among this many likeliest tokens; 0 or -1: among all.',
    'must be an integer >= 1, or 0 or -1 for all',
    lambda k: _is_int(k) and k >= -1,
    none_is_default=True,
    is_recommended=True,
    on_device=OnDevice(0, lambda k: max(k, 0)),
  )
  top_p: float = _probability(
    1.0,
    'Sample among the likeliest tokens that together have this probability.',
    'must be in (0, 1]',
    lambda p: _is_real(p) and 0 < p <= 1,
    1.0,
  )
  min_p: float = _probability(
    0.0,
    "Drop tokens less likely than this fraction of the likeliest token's "
    'probability.',
    'must be in [0, 1]',
    lambda p: _is_real(p) and 0 <= p <= 1,
    0.0,
  )
  seed: int | None = _field(
    None,
    Kind.LONG,
    "Seed of the request's random numbers; the same seed gives the same ones.",
    f'must be an integer in [{MIN_SEED}, {MAX_SEED}]',
    lambda s: s is None or (_is_int(s) and MIN_SEED <= s <= MAX_SEED),
  )
  stop: tuple[str, ...] = _field(
    (),
    Kind.STRINGS,
    'Text that ends the output; may be given several times.',
    'must be strings that are not empty',
    lambda stop: all(isinstance(s, str) and s for s in stop),
    none_is_default=True,
  )
  stop_token_ids: tuple[int, ...] = _field(
    (),
    Kind.IDS,
    'Id of a token that ends the output; may be given several times.',
    'must be token ids >= 0',
    lambda ids: all(_is_int(t) and t >= 0 for t in ids),
    none_is_default=True,
  )
  include_stop_str_in_output: bool = _flag(
    False, 'Keep the stop text at the end of the output.'
  )
  ignore_eos: bool = _flag(
    False, 'Go on generating past the end-of-sequence token.'
  )
  skip_special_tokens: bool = _flag(
    True, "Leave special tokens out of the output's text."
  )
  logprobs: int | None = _field(
    None,
    Kind.INT,
    'Only 0 is supported: log-probabilities of the sampled tokens, which are '
    'always returned.',
    '',
    lambda value: True,
  )

  def __post_init__(self) -> None:
    for name, field in FIELDS.items():
      value = getattr(self, name)
      if value is None and field.none_is_default:
        value = DEFAULTS[name]
      elif field.kind.is_list:
        is_one = field.kind is Kind.STRINGS and isinstance(value, str)
        value = _listed((value,) if is_one else value)
        _check(isinstance(value, tuple), name, value, 'must be a list')
      else:
        value = _plain(value)
      _check(field.holds(value), name, value, field.rule)
      object.__setattr__(self, name, value)
    if self.seed == -1:  # as in vLLM
      object.__setattr__(self, 'seed', None)
    if self.logprobs not in (None, 0) or isinstance(self.logprobs, bool):
      raise errors.UnsupportedError(
        f"logprobs={errors.shown(self.logprobs)}: only the sampled token's "
        "log-probability is returned (logprobs=0; in OpenAI's chats, "
        'top_logprobs=0).'
      )

  @classmethod
  def from_dict(
    cls,
    fields: Mapping[str, Any],
    defaults: Mapping[str, Any] = MappingProxyType({}),
  ) -> SamplingParams:
    """Makes parameters from decoded JSON.

    Args:
      fields: what is said.
      defaults: fields for what is not, or is null.

    Raises:
      UnsupportedError: a field that vLLM knows and this engine does not
        honour, at a value that would change the output.
      InvalidRequestError: an unknown field, or a value out of range.
    """
    if not isinstance(fields, Mapping):
      raise errors.InvalidRequestError(
        f'sampling={errors.shown(fields)}: must be an object of sampling '
        'fields.'
      )
    kept = {}
    said = {
      name: value
      for name, value in fields.items()
      if value is not None
      or not (name in FIELDS and FIELDS[name].none_is_default)
    }
    for name, value in {**defaults, **said}.items():
      if name in FIELDS:
        kept[name] = value
      elif name not in UNSUPPORTED:
        raise errors.InvalidRequestError(
          f'{errors.cut(str(name))}={errors.shown(value)}: unknown sampling '
          f'field; known: '
          f'{", ".join(sorted(FIELDS))}.'
        )
      elif value is not None and UNSUPPORTED[name] != (
        tuple(value) if isinstance(value, list) else value
      ):
        raise errors.UnsupportedError(
          f'{name}={errors.shown(value)}: this sampling field is not supported.'
        )
    return cls(**kept)

  @classmethod
  def defaults(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `defaults` for `from_dict`, whole, of decoded JSON.

    What this engine does not honour, and changes nothing, is left out.

    Raises:
      InvalidRequestError: see `from_dict`.
    """
    params = cls.from_dict(fields)
    return {name: getattr(params, name) for name in fields if name in FIELDS}


def _check(ok: bool, field: str, value: object, rule: str) -> None:
  if not ok:
    raise errors.InvalidRequestError(f'{field}={errors.shown(value)}: {rule}.')


FIELDS: Mapping[str, Field] = {
  field.name: field.metadata['field']
  for field in dataclasses.fields(SamplingParams)
}
DEFAULTS: Mapping[str, Any] = {
  field.name: field.default for field in dataclasses.fields(SamplingParams)
}
