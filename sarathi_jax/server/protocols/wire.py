# SPDX-License-Identifier: Apache-2.0
"""Checks a serialized message before it is parsed.

To parse 16 MiB of empty parts takes half a second in which no other thread of
Python runs. This counts what there is, as `limits` says, and stops at the
first bound; it is Python, which lets other threads run meanwhile.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
import dataclasses
import functools
from typing import Any

from google.protobuf import descriptor

from sarathi_jax import errors
from sarathi_jax.server.guard import limits as limits_lib

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_FIXED_SIZES = {_FIXED64: 8, _FIXED32: 4}
_SLICE = 2**20  # of bytes looked through at once
_NOT_LAST = bytes(range(128, 256))  # bytes of a varint that goes on

_Field = descriptor.FieldDescriptor
_WIRE_TYPES = {
  **dict.fromkeys(
    (_Field.TYPE_DOUBLE, _Field.TYPE_FIXED64, _Field.TYPE_SFIXED64), _FIXED64
  ),
  **dict.fromkeys(
    (_Field.TYPE_FLOAT, _Field.TYPE_FIXED32, _Field.TYPE_SFIXED32), _FIXED32
  ),
  **dict.fromkeys(
    (_Field.TYPE_STRING, _Field.TYPE_BYTES, _Field.TYPE_MESSAGE), _LENGTH
  ),
}


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Known:
  """What is known about a field of a message.

  Attributes:
    name: the field's.
    row: the row of `limits` that bounds its entries; None: they are not many.
    part: the fields of the message, if the field is one.
    packed: the wire type of the numbers, if the field is a list of some.
  """

  name: str
  row: str | None = None
  part: Callable[[], _Plan] | None = None
  packed: int | None = None


_Plan = dict[int, _Known]  # by tag: number << 3 | wire type


@functools.cache
def _plan(message: descriptor.Descriptor) -> _Plan:
  plan: _Plan = {}
  for field in message.fields:
    wire_type = _WIRE_TYPES.get(field.type, _VARINT)
    row = limits_lib.COUNTED.get(field.full_name)
    part = None
    if field.message_type is not None:
      part = functools.partial(_plan, field.message_type)
      if field.message_type.GetOptions().map_entry:
        row = 'max_parameters'
    plan[field.number << 3 | wire_type] = _Known(field.name, row, part)
    if field.is_repeated and wire_type != _LENGTH:
      plan[field.number << 3 | _LENGTH] = _Known(
        field.name, row or 'max_numbers', packed=wire_type
      )
  return plan


def check(
  data: bytes,
  message: descriptor.Descriptor,
  limits: limits_lib.Limits,
  *,
  refuses_unknown: bool,
) -> None:
  """Refuses a message that has too many entries, or is malformed.

  Args:
    data: the serialized message.
    message: its type.
    limits: the most that it may have.
    refuses_unknown: whether to refuse fields that `message` does not have,
      rather than ignore what a newer client asks for.

  Raises:
    InvalidRequestError: the message must not be parsed.
    UnsupportedError: a field is not known.
  """
  counts: collections.Counter[str] = collections.Counter()
  num_fields = 0
  parts = [(0, len(data), message.full_name, _plan(message))]
  try:
    while parts:
      start, stop, name, plan = parts.pop()
      for tag, begin, end in _fields(data, start, stop):
        num_fields += 1
        if num_fields > limits.max_fields:
          limits.check_so_far('max_fields', num_fields, message.full_name)
        known = plan.get(tag)
        if known is None:
          if refuses_unknown:
            raise errors.UnsupportedError(
              f'{name}: this server does not know its field number {tag >> 3}.'
            )
          continue
        if known.row is not None:
          counts[known.row] += (
            1
            if known.packed is None
            else _num_packed(data, begin, end, known.packed)
          )
          limits.check_so_far(known.row, counts[known.row], known.name)
        if known.part is not None:
          parts.append((begin, end, known.name, known.part()))
  except IndexError:
    raise _no_message(message) from None


def _fields(
  data: bytes, start: int, stop: int
) -> Iterator[tuple[int, int, int]]:
  """Yields the fields of a message: tag, where its value begins and ends.

  Raises:
    IndexError: these bytes are no message.
  """
  while start < stop:
    tag = data[start]
    start += 1
    if tag > 127:
      tag, start = _varint(data, start - 1)
    wire_type = tag & 7
    if wire_type == _LENGTH:
      length = data[start]
      start += 1
      if length > 127:
        length, start = _varint(data, start - 1)
      end = start + length
    elif wire_type == _VARINT:
      end = start + 1
      if data[start] > 127:
        _, end = _varint(data, start)
    elif wire_type in _FIXED_SIZES:
      end = start + _FIXED_SIZES[wire_type]
    else:
      raise IndexError  # a group, which no message of today has
    if end > stop:
      raise IndexError
    yield tag, start, end
    start = end


def _varint(data: bytes, start: int) -> tuple[int, int]:
  """Reads a varint; returns the number and where it ends."""
  value = 0
  for i in range(10):
    byte = data[start + i]
    value |= (byte & 127) << 7 * i
    if byte < 128:
      return value, start + i + 1
  raise IndexError


def _num_packed(data: bytes, start: int, stop: int, wire_type: int) -> int:
  """Counts the numbers in a packed list."""
  if wire_type != _VARINT:
    return (stop - start) // _FIXED_SIZES[wire_type]
  return sum(
    len(data[i : min(i + _SLICE, stop)].translate(None, _NOT_LAST))
    for i in range(start, stop, _SLICE)
  )


def _no_message(message: Any) -> errors.InvalidRequestError:
  return errors.InvalidRequestError(
    f'{message.full_name}: these bytes are no message of this type.'
  )
