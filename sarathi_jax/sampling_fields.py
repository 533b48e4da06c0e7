# SPDX-License-Identifier: Apache-2.0
"""What there is to know of a field of `SamplingParams`. No JAX."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import enum
import re
from typing import Any, NamedTuple

from sarathi_jax import config

_is_int, _is_real = config.is_int, config.is_real
_ID = re.compile(r'[0-9]{1,10}')  # as JSON spells keys


class Kind(enum.Enum):
  """What the values of a field are."""

  INT = 'an integer of 32 bits'
  LONG = 'an integer of 64 bits'
  FLOAT = 'a real number'
  BOOL = 'true or false'
  STRINGS = 'a list of strings'
  IDS = 'a list of token ids'
  BIAS = 'a map of token ids to real numbers'
  NAME = 'one of some names'
  OUTPUTS = 'an object that says what the output has to be'

  @property
  def is_list(self) -> bool:
    return self in (Kind.STRINGS, Kind.IDS)

  @property
  def is_object(self) -> bool:
    """Whether JSON writes them as objects."""
    return self in (Kind.BIAS, Kind.OUTPUTS)


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
    adjusts: whether it changes the logits by what the device keeps of a
      sequence, see `runner.adjusting`.
  """

  kind: Kind
  help: str
  rule: str
  holds: Callable[[Any], bool]
  none_is_default: bool = False
  is_recommended: bool = False
  on_device: OnDevice | None = None
  adjusts: bool = False


def field(default: Any, *args: Any, **kwargs: Any) -> Any:
  """Returns the dataclass field that a `Field` of these arguments describes."""
  field = Field(*args, **kwargs)
  return dataclasses.field(
    default=default,
    hash=field.kind is not Kind.BIAS,  # A dict has none.
    metadata={'field': field},
  )


def flag(default: bool, help: str) -> Any:
  """Returns a field that is true or false."""
  return field(
    default,
    Kind.BOOL,
    help,
    'must be true or false',
    lambda value: isinstance(value, bool),
  )


def probability(
  default: float,
  help: str,
  rule: str,
  holds: Callable[[Any], bool],
  neutral: float,
) -> Any:
  """Returns a number that the device gets, and a checkpoint may recommend."""
  return field(
    default,
    Kind.FLOAT,
    help,
    rule,
    holds,
    none_is_default=True,
    is_recommended=True,
    on_device=OnDevice(neutral),
  )


def logprobs(help: str, most: int) -> Any:
  """Returns a number of likeliest tokens to tell of, or None for none."""
  return field(
    None,
    Kind.INT,
    f'{help}; at most {most}.',
    f'must be an integer in [0, {most}]',
    lambda num: num is None or (_is_int(num) and 0 <= num <= most),
  )


def name(default: str, names: tuple[str, ...], help: str) -> Any:
  """Returns one of some names."""
  return field(
    default,
    Kind.NAME,
    help,
    f'must be one of {", ".join(names)}',
    lambda value: isinstance(value, str) and value in names,
    none_is_default=True,
  )


def plain(value: Any) -> Any:
  """A scalar of NumPy or JAX as Python's; other things as they are."""
  is_scalar = getattr(value, 'ndim', None) == 0 and hasattr(value, 'item')
  return value.item() if is_scalar else value


def listed(value: Any) -> Any:
  """A list, or an array of NumPy or JAX, as a tuple of plain values."""
  if getattr(value, 'ndim', None) == 1 and hasattr(value, 'tolist'):
    value = value.tolist()
  return (
    tuple(map(plain, value)) if isinstance(value, (tuple, list)) else (value)
  )


def penalty(
  default: float,
  help: str,
  rule: str,
  holds: Callable[[float], bool],
  *,
  is_recommended: bool = False,
) -> Any:
  """Returns a number by which logits of tokens are changed that were there."""
  return field(
    default,
    Kind.FLOAT,
    help,
    rule,
    lambda value: _is_real(value) and holds(value),
    none_is_default=True,
    is_recommended=is_recommended,
    on_device=OnDevice(default),
    adjusts=True,
  )


def ids(
  default: Any, help: str, *, most: int | None = None, **more: Any
) -> Any:
  """Returns a list of token ids; if None is its default, it is not empty."""
  rule = 'must be token ids >= 0'
  if default is None:
    rule += ', at least one'
  if most is not None:
    rule += f', at most {most}'
  return field(
    default,
    Kind.IDS,
    help,
    rule,
    lambda ids: (
      ids is None
      or (
        (default is not None or bool(ids))
        and (most is None or len(ids) <= most)
        and all(_is_int(token) and token >= 0 for token in ids)
      )
    ),
    none_is_default=True,
    **more,
  )


def is_bias(value: Any) -> bool:
  """Says whether a value is what `biases` returns."""
  return isinstance(value, dict) and all(
    _is_int(token) and token >= 0 and _is_real(bias)
    for token, bias in value.items()
  )


def biases(value: Any) -> Any:
  """Returns token id -> bias; JSON's ids, which are strings, as integers."""
  if not isinstance(value, Mapping):
    return value
  return {
    int(token)
    if isinstance(token, str) and _ID.fullmatch(token)
    else plain(token): plain(bias)
    for token, bias in value.items()
  }
