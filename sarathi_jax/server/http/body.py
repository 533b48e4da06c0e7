# SPDX-License-Identifier: Apache-2.0
"""Turns the bytes of a body into JSON, without holding the interpreter long.

To parse 16 MiB of `[[],[],...` takes a second in which no other thread of
Python runs. So this counts first, slice by slice, and stops at the first bound;
what is parsed then are few parts, few escaped characters, and numbers, which
Python reads one by one.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

from sarathi_jax import errors
from sarathi_jax.server.guard import limits as limits_lib

_SLICE = 2**16  # bytes looked through at once
_MOST_DIGITS = 64  # of a number: reading it takes time by their square
_QUOTE = b'"'
_NOT_COUNTED = bytes(set(range(256)) - set(b',:[{'))


def parse(data: bytes, limits: limits_lib.Limits) -> dict[str, Any]:
  """Returns the object that a body is; any thread.

  Raises:
    InvalidRequestError: it is none, or has too many parts.
  """
  check(data, limits)
  try:
    fields = json.loads(
      data.decode(),
      parse_int=_integer,
      parse_float=_real,
      parse_constant=_constant,
      object_pairs_hook=_object,
    )
  except errors.InvalidRequestError:
    raise
  except UnicodeDecodeError as error:
    raise errors.InvalidRequestError(
      f'body: is not UTF-8: {errors.cut(str(error))}.'
    ) from None
  except RecursionError:
    raise errors.InvalidRequestError('body: is nested too deeply.') from None
  except ValueError as error:
    raise errors.InvalidRequestError(
      f'body: is not JSON: {errors.cut(str(error))}.'
    ) from None
  if not isinstance(fields, dict):
    raise errors.InvalidRequestError(
      f'body={errors.shown(fields)}: must be a JSON object.'
    )
  return fields


def check_parts(text: str, limits: limits_lib.Limits, field: str) -> None:
  """Refuses JSON within a body that has too many parts to be parsed at once.

  Args:
    text: the JSON, which is one text to the body.
    limits: the bounds; numbers count as fields here.
    field: where it is.

  Raises:
    InvalidRequestError: there are too many.
  """
  data = text.encode(errors='surrogatepass')
  check(data, limits, field, numbers='max_fields')


def check(
  data: bytes,
  limits: limits_lib.Limits,
  field: str = 'body',
  numbers: str = 'max_numbers',
) -> None:
  """Refuses a body with too many parts; whether it is JSON, it does not ask.

  Args:
    data: the body, or some other JSON.
    limits: the bounds.
    field: where it is.
    numbers: the row that bounds what stands behind commas.

  Raises:
    InvalidRequestError: there are too many.
  """
  num = {char: 0 for char in b',:[{'}
  num_quotes = num_escapes = start = 0
  while start < len(data):
    stop = min(start + _SLICE, len(data))
    while stop < len(data) and data[stop - 1] == ord('\\'):
      stop += 1  # what it escapes belongs to it
    part = data[start:stop]
    num_escapes += part.count(b'\\')
    limits.check_so_far('max_escapes', num_escapes, field)
    part = part.replace(b'\\\\', b'').replace(b'\\"', b'')
    pieces = part.split(_QUOTE)
    outside = b''.join(pieces[num_quotes % 2 :: 2]).translate(
      None, _NOT_COUNTED
    )
    for char in num:
      num[char] += outside.count(char)
    num_quotes += len(pieces) - 1
    num_keys = num[ord(':')]
    num_texts = num_quotes // 2 - num_keys
    # Lists and objects, and their keys or texts: of a message, mostly as many.
    limits.check_so_far(
      'max_fields',
      num[ord('[')] + num[ord('{')] + max(num_keys, num_texts),
      field,
    )
    limits.check_so_far(numbers, num[ord(',')], field)
    start = stop


def _integer(text: str) -> int:
  return int(_short(text))


def _real(text: str) -> float:
  return float(_short(text))


def _short(text: str) -> str:
  if len(text) > _MOST_DIGITS:
    raise errors.InvalidRequestError(
      f'body: has the number {errors.cut(text, 20)}: must have at most '
      f'{_MOST_DIGITS} digits.'
    )
  return text


def _constant(text: str) -> NoReturn:
  raise errors.InvalidRequestError(f'body: has {text}, which is not JSON.')


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  made: dict[str, Any] = {}
  for name, value in pairs:
    if name in made:  # else one of the two would be ignored
      raise errors.InvalidRequestError(f'{errors.cut(name)}: is there twice.')
    made[name] = value
  return made
