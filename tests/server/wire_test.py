# SPDX-License-Identifier: Apache-2.0
"""What is counted before a message is parsed, and what is refused there."""

from __future__ import annotations

import contextlib
from typing import Any

from google.protobuf import message as message_lib
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
import hypothesis
from hypothesis import strategies as st
import pytest
from smg_grpc_proto import vllm_engine_pb2 as vllm

from sarathi_jax import errors
from sarathi_jax.server import open_inference_pb2 as oip
from sarathi_jax.server import sarathi_pb2 as pb
from sarathi_jax.server.guard import limits as limits_lib
from sarathi_jax.server.protocols import wire

_FEW = limits_lib.Limits(
  max_fields=50,
  max_numbers=50,
  max_parameters=20,
  max_messages=20,
  max_stops=20,
  max_stop_token_ids=20,
  max_abort_ids=20,
  max_tensors=20,
  max_adjusted_token_ids=20,
)
_MANY = 60

# The messages that each service takes.
REQUESTS = [
  method.input_type
  for module in (pb, vllm, oip, health_pb2, reflection_pb2)
  for service in module.DESCRIPTOR.services_by_name.values()
  for method in service.methods
]


def _check(
  data: bytes, message: Any, limits: limits_lib.Limits = _FEW, **kwargs: Any
) -> None:
  wire.check(
    data,
    getattr(message, 'DESCRIPTOR', message),
    limits,
    **{'refuses_unknown': False, **kwargs},
  )


def _field(number: int, data: bytes, wire_type: int = 2) -> bytes:
  tag = _varint(number << 3 | wire_type)
  return tag + (_varint(len(data)) if wire_type == 2 else b'') + data


def _varint(value: int) -> bytes:
  data = bytearray()
  while value > 127:
    data.append(value & 127 | 128)
    value >>= 7
  return bytes((*data, value))


def _lists(message: Any, path: tuple[int, ...] = ()) -> Any:
  """(path of numbers, field) of each list in a message, however deep."""
  for field in message.fields:
    if field.is_repeated:
      yield (*path, field.number), field
    if field.message_type is not None and len(path) < 4:
      yield from _lists(field.message_type, (*path, field.number))


LISTS = [
  pytest.param(root, path, field, id=f'{root.name}.{field.full_name}')
  for root in dict.fromkeys(REQUESTS)
  for path, field in _lists(root)
]


@pytest.mark.parametrize('root, path, field', LISTS)
def test_every_list_of_every_request_is_bounded(
  root: Any, path: tuple[int, ...], field: Any
) -> None:
  *outer, last = path
  data = _field(last, b'') * _MANY
  if field.message_type is None and field.type not in (
    field.TYPE_STRING,
    field.TYPE_BYTES,
  ):
    # Packed; of eight bytes each they are many, whatever the type.
    data = _field(last, b'\0' * 8 * _MANY)
  for number in reversed(outer):
    data = _field(number, data)
  with pytest.raises(errors.InvalidRequestError, match='must be at most'):
    _check(data, root)


def test_there_are_lists_in_every_protocol() -> None:
  found = {param.values[0].file.package for param in LISTS}
  assert {'sarathi.v1', 'vllm.grpc.engine', 'inference'} <= found


def test_numbers_that_are_not_packed_are_counted() -> None:
  ids = _field(1, b'\5', 0)
  _check(_field(3, ids * 40), pb.GenerateRequest)
  with pytest.raises(errors.InvalidRequestError, match='max_fields=50'):
    _check(_field(3, ids * 60), pb.GenerateRequest)


@pytest.mark.parametrize('ids', [[1], [300], [2**31 - 1], [-1]])
def test_packed_numbers_are_counted_by_their_ends(ids: list[int]) -> None:
  limits = limits_lib.Limits(max_numbers=1000)
  for num, is_right in ((1000, True), (1001, False)):
    data = pb.GenerateRequest(
      token_ids=pb.TokenIds(ids=ids * num)
    ).SerializeToString()
    with (
      contextlib.nullcontext()
      if is_right
      else pytest.raises(
        errors.InvalidRequestError, match='ids: has too many numbers'
      )
    ):
      _check(data, pb.GenerateRequest, limits)


def test_all_that_is_merged_counts() -> None:
  chat = pb.GenerateRequest(
    chat=pb.Chat(messages=[pb.ChatMessage(role='user', content='x')] * 8)
  ).SerializeToString()
  _check(chat, pb.GenerateRequest)
  with pytest.raises(errors.InvalidRequestError, match='max_messages=20'):
    _check(chat * 3, pb.GenerateRequest, limits_lib.Limits(max_messages=20))


def test_a_number_is_read_however_long_it_is_written() -> None:
  # 8 << 3 | 2, of one byte and of three.
  stops = (b'\x42\0' + b'\xc2\x80\0\0') * 11
  with pytest.raises(errors.InvalidRequestError, match='max_stops=20'):
    _check(_field(5, stops), pb.GenerateRequest)


@pytest.mark.parametrize(
  'data',
  [
    _field(111, b'\1', 0),
    _field(111, b''),
    _field(5, _field(111, b'\1', 0)),
    _field(2, b'\1', 0),  # known, but of another type
  ],
)
def test_what_is_not_known_is_refused_if_asked(data: bytes) -> None:
  _check(data, pb.GenerateRequest)
  with pytest.raises(errors.UnsupportedError, match=r'field number (111|2)\.'):
    _check(data, pb.GenerateRequest, refuses_unknown=True)


@pytest.mark.parametrize(
  'data',
  [
    b'\xff',
    b'\x12\x05abc',
    b'\x0b',
    b'\xff' * 12,
    b'\x12',
    _field(5, b'\x42\x7f'),
    b'\x09' + b'1234567',
    b'\x12' + b'\xff' * 9 + b'\1',
  ],
)
def test_what_is_no_message_is_refused(data: bytes) -> None:
  with pytest.raises(errors.InvalidRequestError, match='no message'):
    _check(data, pb.GenerateRequest)


@hypothesis.given(st.binary(max_size=40))
def test_what_protobuf_takes_is_taken_or_is_a_group(data: bytes) -> None:
  """Nor does it read past the end, or raise anything else."""
  for cls in (pb.GenerateRequest, oip.ModelInferRequest):
    try:
      _check(data, cls)
      is_taken = True
    except errors.InvalidRequestError:
      is_taken = False
    try:
      cls.FromString(data)
      is_right = True
    except message_lib.DecodeError:
      is_right = False
    has_group = any(byte & 7 in (3, 4) for byte in data)
    assert is_taken or not is_right or has_group
