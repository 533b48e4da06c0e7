# SPDX-License-Identifier: Apache-2.0
"""Nonsense over all protocols: the right status each time, nobody disturbed.

The code alone must say whose fault it was: a request is served, refused as
INVALID_ARGUMENT, NOT_FOUND or RESOURCE_EXHAUSTED (its message is too large),
and never anything else. Meanwhile good requests get their exact tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import functools
import pathlib
import threading
from typing import Any

import grpc
import hypothesis
from hypothesis import strategies as st
import pytest
from smg_grpc_proto import vllm_engine_pb2 as vllm

from sarathi_jax.server import open_inference_pb2 as oip
from sarathi_jax.server import sarathi_pb2 as pb
from tests.server import fake

_ALLOWED = {
  grpc.StatusCode.OK,
  grpc.StatusCode.INVALID_ARGUMENT,
  grpc.StatusCode.NOT_FOUND,
  grpc.StatusCode.RESOURCE_EXHAUSTED,
}
_EDGES = {
  'TYPE_FLOAT': st.sampled_from(
    [
      0.0,
      -0.0,
      1.0,
      0.5,
      -1.0,
      2.0,
      1e38,
      float('nan'),
      float('inf'),
      -float('inf'),
    ]
  ),
  'TYPE_DOUBLE': st.sampled_from(
    [0.0, 1.0, 0.5, -1.0, 1e308, 5e-324, float('nan'), float('inf')]
  ),
  'TYPE_INT32': st.sampled_from([0, 1, 5, 63, 64, -1, 2**31 - 1, -(2**31)]),
  'TYPE_INT64': st.sampled_from([0, 1, 5, 64, -1, 2**31, 2**63 - 1, -(2**63)]),
  'TYPE_UINT32': st.sampled_from([0, 1, 5, 63, 64, 2**31, 2**32 - 1]),
  'TYPE_UINT64': st.sampled_from([0, 1, 5, 64, 2**63, 2**64 - 1]),
  'TYPE_BOOL': st.booleans(),
  'TYPE_STRING': st.sampled_from(
    [
      '',
      't1',
      't1 t2 t3',
      'a',
      '\0',
      '\U0001f600',
      'x' * 5000,
      '{"a": NaN}',
      '[[[[',
      '{"max_tokens": 3}',
      '{"n": 1e999}',
      'counting',
      'user',
    ]
  ),
  'TYPE_BYTES': st.sampled_from(
    [
      b'',
      b't1',
      b't1 t2',
      b'\xff\xfe',
      b'\0' * 4,
      b'\xff\xff\xff\xff',
      b'\1\0\0\0\0',
      b'\2\0\0\0t1',
      b'\0' * 8,
    ]
  ),
  'TYPE_ENUM': st.sampled_from([0, 1, 2, 7, -1]),
}
_TYPES = {
  value: name
  for name, value in vars(
    oip.ModelInferRequest.DESCRIPTOR.fields[0].__class__
  ).items()
  if name.startswith('TYPE_')
}
# Values that lead past the first check, as a message of noise seldom does.
_HINTS = {
  'model_name': st.sampled_from(['counting', 'counting', 'x', '']),
  'model_version': st.sampled_from(['', '', '1', '9']),
  'name': st.sampled_from(
    [
      'text_input',
      'input_ids',
      'max_tokens',
      'stop',
      'text_output',
      'temperature',
      'stream',
      'odd',
    ]
  ),
  'datatype': st.sampled_from(['BYTES', 'INT64', 'INT32', 'FP32', 'BOOL', '?']),
  'max_tokens': st.sampled_from([0, 1, 2, 5, 100]),
  'shape': st.sampled_from([0, 1, 1, 2, 3]),
  'ids': st.integers(0, 63),
  'input_ids': st.integers(0, 63),
  'request_id': st.sampled_from(['', 'a', 'b', 'c']),
}
_KEYS = st.sampled_from(
  [
    'max_tokens',
    'temperature',
    'stream',
    'seed',
    'odd',
    'sampling_parameters',
    'top_k',
  ]
)


def _value(draw: Any, field: Any, depth: int) -> Any:
  if field.message_type is not None:
    return _message(draw, field.message_type._concrete_class, depth + 1)
  return draw(_HINTS.get(field.name, _EDGES[_TYPES[field.type]]))


def _message(draw: Any, cls: Any, depth: int = 0) -> Any:
  """A message with some of its fields set, at their edges."""
  message = cls()
  fields = list(cls.DESCRIPTOR.fields)
  chosen = (
    draw(
      st.lists(
        st.sampled_from(fields),
        max_size=5 if depth < 4 else 0,
        unique_by=lambda f: f.name,
      )
    )
    if fields
    else []
  )
  for field in chosen:
    if field.message_type is not None and (
      field.message_type.GetOptions().map_entry
    ):
      value = field.message_type.fields_by_name['value']
      key = (
        draw(_KEYS)
        if field.message_type.fields_by_name['key'].type == field.TYPE_STRING
        else draw(st.integers(-2, 70))
      )
      if value.message_type is None:
        getattr(message, field.name)[key] = _value(draw, value, depth)
      else:
        getattr(message, field.name)[key].CopyFrom(_value(draw, value, depth))
    elif field.is_repeated:
      items = getattr(message, field.name)
      for _ in range(draw(st.integers(0, 3))):
        item = _value(draw, field, depth)
        items.append(item)
    elif field.message_type is not None:
      getattr(message, field.name).CopyFrom(_value(draw, field, depth))
    else:
      setattr(message, field.name, _value(draw, field, depth))
  return message


def _likely(draw: Any, message: Any) -> Any:
  """Often with a prompt and few tokens, so that it may be served."""
  if draw(st.booleans()):
    match message:
      case pb.GenerateRequest():
        message.token_ids.ids[:] = [1, 2]
      case vllm.GenerateRequest():
        message.tokenized.input_ids[:] = [1, 2]
      case oip.ModelInferRequest():
        message.model_name = 'counting'
        message.ClearField('raw_input_contents')
        message.inputs.add(
          name='input_ids',
          datatype='INT64',
          shape=[2],
          contents={'int64_contents': [1, 2]},
        )
  return message


_METHODS = {
  pb.GenerateRequest: '/sarathi.v1.Sarathi/Generate',
  vllm.GenerateRequest: '/vllm.grpc.engine.VllmEngine/Generate',
  oip.ModelInferRequest: '/inference.GRPCInferenceService/ModelInfer',
}


@st.composite
def _calls(draw: Any) -> tuple[str, bytes]:
  cls = draw(st.sampled_from(list(_METHODS)))
  data = _likely(draw, _message(draw, cls)).SerializeToString()
  match draw(st.integers(0, 9)):
    case 0:  # cut off
      data = data[: draw(st.integers(0, len(data)))]
    case 1:  # a byte is another
      i = draw(st.integers(0, max(len(data) - 1, 0)))
      data = data[:i] + draw(st.binary(min_size=1, max_size=1)) + data[i + 1 :]
    case 2:
      data = draw(st.binary(max_size=30))
  return _METHODS[cls], data


class _Good(threading.Thread):
  """Good requests, whose tokens must be exact, all the while."""

  def __init__(self, server: fake.RunningServer) -> None:
    super().__init__()
    self._server = server
    self.is_over = False
    self.num_wrong = self.num_right = 0

  def run(self) -> None:
    while not self.is_over:
      first = self.num_right % 50
      tokens = fake.take(
        self._server.generate(
          token_ids=[first], sampling={'max_tokens': 8, 'ignore_eos': True}
        )
      )
      self.num_right += 1
      self.num_wrong += tokens != [(first + 1 + k) % 64 for k in range(8)]


@pytest.fixture(scope='module')
def fuzzed(tokenizer_folder: pathlib.Path) -> Iterator[fake.RunningServer]:
  with contextlib.closing(
    fake.RunningServer(
      functools.partial(fake.make_engine, tokenizer_folder=tokenizer_folder)
    )
  ) as running:
    yield running


def _fuzz(server: fake.RunningServer, num_calls: int) -> None:
  codes: dict[grpc.StatusCode, int] = {}
  good = _Good(server)
  good.start()

  @hypothesis.settings(
    max_examples=num_calls // 10,
    deadline=None,
    database=None,
    phases=[hypothesis.Phase.generate],
    suppress_health_check=list(hypothesis.HealthCheck),
  )
  @hypothesis.given(st.lists(_calls(), min_size=10, max_size=10))
  def fuzz(calls: list[tuple[str, bytes]]) -> None:
    under_way = [
      server.channel.unary_stream(method)(data, timeout=fake.TIMEOUT_S)
      for method, data in calls
    ]
    for call, (method, data) in zip(under_way, calls, strict=True):
      with contextlib.suppress(grpc.RpcError):
        for _ in call:
          pass
      code = call.code()
      codes[code] = codes.get(code, 0) + 1
      assert code in _ALLOWED, (code, call.details(), method, data)

  try:
    fuzz()
  finally:
    good.is_over = True
    good.join(fake.TIMEOUT_S)
  assert sum(codes.values()) >= num_calls
  # It is of use only if both happen a lot.
  assert codes[grpc.StatusCode.OK] > num_calls // 50
  assert codes[grpc.StatusCode.INVALID_ARGUMENT] > num_calls // 5
  assert good.num_right > 10 and not good.num_wrong
  fake.wait_until(server.all_pages_are_free)
  assert server.is_alive()


def test_nonsense(fuzzed: fake.RunningServer) -> None:
  _fuzz(fuzzed, 1000)


@pytest.mark.slow
def test_much_nonsense(fuzzed: fake.RunningServer) -> None:
  _fuzz(fuzzed, 5_000)
