# SPDX-License-Identifier: Apache-2.0
"""Bodies that a client can make large at no cost, and honest large ones.

They are serialized before, as their sender is not to be measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
import json
from typing import NamedTuple

from smg_grpc_proto import vllm_engine_pb2 as vllm

from sarathi_jax.server import open_inference_pb2 as oip
from sarathi_jax.server import sarathi_pb2 as pb

_MIB = 2**20
_LARGEST = 15 * _MIB  # below what a server reads by default
_SERVED_TOKENS, _SERVED_MESSAGES = 100_000, 10_000
_NUM_CALLS = {'20 x GetTokenizer': 20, '3,000 calls at once': 3000}


class Body(NamedTuple):
  """A body to send, how often at once, and whether it is to be served."""

  name: str
  method: str
  data: bytes
  num_calls: int = 1
  is_served: bool = False


def all_bodies(only: str = '') -> Iterator[Body]:
  """Yields bodies with `only` in their names, each made when it is asked for.

  Together they are gigabytes.
  """
  tables = (_sarathi(), _vllm(), _open_inference(), _others(), _served())
  for table in tables:
    for name, (method, make) in table.items():
      if only in name:
        num_calls = _NUM_CALLS.get(name, 1)
        yield Body(name, method, make(), num_calls, table is tables[-1])


_Table = Mapping[str, tuple[str, Callable[[], bytes]]]


def _field(number: int, data: bytes) -> bytes:
  """Encodes a field of a message."""
  return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
  data = bytearray()
  while value > 127:
    data.append(value & 127 | 128)
    value >>= 7
  return bytes((*data, value))


def _filled(*path: int, item: bytes = b'') -> bytes:
  """Encodes the last field of a path as often as there is room."""
  *outer, last = path
  one = _field(last, item)
  data = one * (_LARGEST // len(one))
  for number in reversed(outer):
    data = _field(number, data)
  return data


def _sarathi() -> _Table:
  method = '/sarathi.v1.Sarathi/Generate'
  sampling = pb.SamplingParams

  def generate(**fields: object) -> bytes:
    return pb.GenerateRequest(**fields).SerializeToString()  # type: ignore

  def sampled(**fields: object) -> bytes:
    return generate(text='A list is', sampling=sampling(**fields))  # type: ignore

  return {
    'text, 1 MB': (method, lambda: generate(text='hello world ' * 87_000)),
    'text, 15 MB': (method, lambda: generate(text='hello world ' * 1_300_000)),
    'text, 15 MB, one word': (method, lambda: generate(text='a' * _LARGEST)),
    'text, 2 MB, of spaces': (method, lambda: generate(text=' ' * 2_000_000)),
    'text, 15 MB, not ASCII': (
      method,
      lambda: generate(text='\u4e2d' * (_LARGEST // 3)),
    ),
    'token_ids, 15 M': (
      method,
      lambda: generate(token_ids=pb.TokenIds(ids=[5] * _LARGEST)),
    ),
    'token_ids, 7 M, not packed': (
      method,
      lambda: _field(3, b'\x08\x05' * (_LARGEST // 2)),
    ),
    'stop, 200,000 strings': (
      method,
      lambda: sampled(stop=[f'zz{i:06d}' for i in range(200_000)]),
    ),
    'stop, 7 M empty strings': (method, lambda: _filled(5, 8)),
    'stop, 1,000 strings': (
      method,
      lambda: sampled(stop=[f'zz{i:06d}' for i in range(1000)], max_tokens=20),
    ),
    'stop, one of 10 MB': (method, lambda: sampled(stop=['e' * 10_000_000])),
    'stop_token_ids, 10 M': (
      method,
      lambda: sampled(stop_token_ids=[7] * 10_000_000),
    ),
    'chat, 100,000 messages': (
      method,
      lambda: generate(
        chat=pb.Chat(
          messages=[pb.ChatMessage(role='user', content='x')] * 100_000
        )
      ),
    ),
    'chat, 7 M empty messages': (method, lambda: _filled(4, 1)),
    'chat, one message of 15 MB': (
      method,
      lambda: generate(
        chat=pb.Chat(
          messages=[pb.ChatMessage(role='user', content='ab ' * 5_000_000)]
        )
      ),
    ),
    'request_id, 15 MB': (
      method,
      lambda: generate(request_id='x' * _LARGEST, text='hi'),
    ),
    'tier, 15 MB': (method, lambda: generate(text='hi', tier='x' * _LARGEST)),
    'unknown fields, 5 M': (method, lambda: b'\xf8\x06\x01' * (_LARGEST // 3)),
    'text, 5 M times': (method, lambda: _filled(2, item=b'x')),
    'Abort, 1 M ids': (
      '/sarathi.v1.Sarathi/Abort',
      lambda: _field(1, b'x' * 8) * 1_000_000,
    ),
    'GetStats, 15 MB': ('/sarathi.v1.Sarathi/GetStats', lambda: _filled(9)),
  }


def _vllm() -> _Table:
  service = '/vllm.grpc.engine.VllmEngine'
  method = f'{service}/Generate'
  sampling = vllm.GenerateRequest.DESCRIPTOR.fields_by_name[
    'sampling_params'
  ].number
  bias = vllm.SamplingParams.DESCRIPTOR.fields_by_name['logit_bias'].number
  tensors = vllm.GenerateRequest.DESCRIPTOR.fields_by_name['mm_inputs'].number
  return {
    'vllm: text, 15 MB': (
      method,
      lambda: vllm.GenerateRequest(
        text='hello world ' * 1_300_000
      ).SerializeToString(),
    ),
    'vllm: input_ids, 15 M': (
      method,
      lambda: vllm.GenerateRequest(
        tokenized=vllm.TokenizedInput(input_ids=[5] * _LARGEST),
      ).SerializeToString(),
    ),
    'vllm: stop, 200,000 strings': (
      method,
      lambda: vllm.GenerateRequest(
        text='A list is',
        sampling_params=vllm.SamplingParams(
          stop=[f'zz{i:06d}' for i in range(200_000)], max_tokens=20
        ),
      ).SerializeToString(),
    ),
    'vllm: logit_bias, 1 M': (
      method,
      lambda: _field(
        sampling,
        b''.join(_field(bias, b'\x08' + _varint(i)) for i in range(1_000_000)),
      ),
    ),
    'vllm: mm_inputs, 7 M parts': (method, lambda: _filled(tensors, 3)),
    'vllm: Abort, 1 M ids': (
      f'{service}/Abort',
      lambda: _field(1, b'x' * 8) * 1_000_000,
    ),
    'vllm: HealthCheck, 15 MB': (f'{service}/HealthCheck', lambda: _filled(9)),
  }


def _infer(**parameters: str) -> bytes:
  request = oip.ModelInferRequest(model_name='counting')
  request.inputs.add(
    name='text_input',
    datatype='BYTES',
    shape=[1],
    contents=oip.InferTensorContents(bytes_contents=[b'x']),
  )
  for name, value in parameters.items():
    request.parameters[name].string_param = value
  return request.SerializeToString()


def _tensor(name: str, datatype: str, shape: list[int], raw: bytes) -> bytes:
  request = oip.ModelInferRequest(
    model_name='counting', raw_input_contents=[b'\1\0\0\0x', raw]
  )
  request.inputs.add(name='text_input', datatype='BYTES', shape=[1])
  request.inputs.add(name=name, datatype=datatype, shape=shape)
  return request.SerializeToString()


def _open_inference() -> _Table:
  method = '/inference.GRPCInferenceService/ModelInfer'
  streamed = '/inference.GRPCInferenceService/ModelStreamInfer'
  return {
    'inference: shape of 60,000 sizes': (
      method,
      lambda: _tensor('stop', 'BYTES', [2**62] * 60_000, b''),
    ),
    'inference: shape of 15 M sizes': (
      method,
      lambda: _field(5, _field(3, b'\1' * _LARGEST)),
    ),
    'inference: 7 M inputs': (method, lambda: _filled(5)),
    'inference: 7 M outputs': (method, lambda: _filled(6)),
    'inference: 7 M raw contents': (method, lambda: _filled(7)),
    'inference: 1 M parameters': (
      method,
      lambda: b''.join(
        _field(4, _field(1, b'%x' % i) + _field(2, b''))
        for i in range(1_000_000)
      ),
    ),
    'inference: input_ids, 15 M': (
      method,
      lambda: _field(5, _field(5, _field(3, b'\5' * _LARGEST))),
    ),
    'inference: raw ids, 2 M': (
      method,
      lambda: _tensor('input_ids', 'INT64', [1_900_000], b'\0' * 8 * 1_900_000),
    ),
    'inference: raw stop, 4 M': (
      method,
      lambda: _tensor('stop', 'BYTES', [_LARGEST // 4], b'\0' * _LARGEST),
    ),
    'inference: text, 15 MB': (
      method,
      lambda: oip.ModelInferRequest(
        model_name='counting',
        inputs=[
          dict(
            name='text_input',
            datatype='BYTES',
            shape=[1],
            contents=dict(bytes_contents=[b'hello world ' * 1_300_000]),
          )
        ],  # type: ignore
      ).SerializeToString(),
    ),
    'inference: JSON of 10 MB': (
      method,
      lambda: _infer(
        sampling_parameters=json.dumps({'stop': ['x'] * 2_000_000})
      ),
    ),
    'inference: deep JSON': (
      method,
      lambda: _infer(
        sampling_parameters='{"a":' * 100_000 + '1' + '}' * 100_000
      ),
    ),
    'inference: JSON of a huge integer': (
      method,
      lambda: _infer(sampling_parameters='{"seed":%s}' % ('9' * 1_000_000)),
    ),
    'inference: a stream of 7 M inputs': (streamed, lambda: _filled(5)),
    'inference: model name, 15 MB': (
      '/inference.GRPCInferenceService/ModelMetadata',
      lambda: _field(1, b'x' * _LARGEST),
    ),
  }


def _others() -> _Table:
  return {
    '20 x GetTokenizer': (
      '/vllm.grpc.engine.VllmEngine/GetTokenizer',
      lambda: b'',
    ),
    '3,000 calls at once': (
      '/sarathi.v1.Sarathi/Generate',
      lambda: pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=[5]),
        sampling=pb.SamplingParams(max_tokens=2),
      ).SerializeToString(),
    ),
    'health: unknown fields, 5 M': (
      '/grpc.health.v1.Health/Check',
      lambda: _filled(9, item=b'x'),
    ),
    'reflection: unknown fields, 5 M': (
      '/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo',
      lambda: _filled(99),
    ),
    'control: unknown fields, 5 M': (
      '/sarathi.v1.Control/Pause',
      lambda: _filled(9, item=b'x'),
    ),
  }


def _served() -> _Table:
  """Returns honest requests that are large."""
  method = '/sarathi.v1.Sarathi/Generate'
  few = pb.SamplingParams(max_tokens=2)
  ids = [5] * _SERVED_TOKENS
  return {
    'served: 100,000 token ids': (
      method,
      lambda: pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=ids), sampling=few
      ).SerializeToString(),
    ),
    'served: a text of 100,000 tokens': (
      method,
      lambda: pb.GenerateRequest(
        text='the list ' * (_SERVED_TOKENS // 2), sampling=few
      ).SerializeToString(),
    ),
    'served: a chat of 10,000 messages': (
      method,
      lambda: pb.GenerateRequest(
        chat=pb.Chat(
          messages=[
            pb.ChatMessage(role=('user', 'assistant')[i % 2], content='x')
            for i in range(_SERVED_MESSAGES)
          ]
        ),
        sampling=few,
      ).SerializeToString(),
    ),
    'served: vllm, 100,000 token ids': (
      '/vllm.grpc.engine.VllmEngine/Generate',
      lambda: vllm.GenerateRequest(
        tokenized=vllm.TokenizedInput(input_ids=ids),
        sampling_params=vllm.SamplingParams(max_tokens=2),
      ).SerializeToString(),
    ),
    'served: inference, 100,000 token ids': (
      '/inference.GRPCInferenceService/ModelInfer',
      lambda: oip.ModelInferRequest(
        model_name='counting',
        inputs=[
          dict(
            name='input_ids',
            datatype='INT64',
            shape=[len(ids)],
            contents=dict(int64_contents=ids),
          )
        ],  # type: ignore
        parameters={'max_tokens': oip.InferParameter(int64_param=2)},
      ).SerializeToString(),
    ),
  }
