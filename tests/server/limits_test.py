# SPDX-License-Identifier: Apache-2.0
"""What a client can size is bounded before any work is done on it."""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import functools
import json
import string
from typing import Any
import urllib.parse

from absl import flags as absl
import grpc
import pytest
from smg_grpc_proto import vllm_engine_pb2 as vllm

from sarathi_jax import errors
from sarathi_jax.benchmarks import server_front
from sarathi_jax.server import flags
from sarathi_jax.server import open_inference_pb2 as oip
from sarathi_jax.server import sarathi_pb2 as pb
from sarathi_jax.server.guard import limits as limits_lib
from sarathi_jax.server.protocols import status
from tests import absl_flags
from tests.server import fake

_CODE = grpc.StatusCode
_SARATHI = '/sarathi.v1.Sarathi/Generate'
_VLLM = '/vllm.grpc.engine.VllmEngine/Generate'
_INFER = '/inference.GRPCInferenceService/ModelInfer'
_STREAM = '/inference.GRPCInferenceService/ModelStreamInfer'


def _send(
  running: fake.RunningServer, method: str, message: Any
) -> tuple[grpc.StatusCode, str, list[bytes]]:
  call: Any = running.channel.unary_stream(method)
  data: Any = message.SerializeToString()
  if method == _STREAM:
    call, data = running.channel.stream_stream(method), iter([data])
  call, answers = call(data, timeout=60), []
  with contextlib.suppress(grpc.RpcError):
    answers = list(call)
  return call.code(), call.details(), answers


# The table.


def test_every_row_says_what_and_why_and_is_a_flag() -> None:
  with absl_flags.defined(flags.define_server_flags):
    for name, row in limits_lib.ROWS.items():
      assert row.metadata['what'] and row.metadata['why'], name
      assert row.metadata['why'] in ' '.join(absl.FLAGS[name].help.split())
      assert absl.FLAGS[name].value is None


@pytest.mark.parametrize('name', limits_lib.ROWS)
def test_a_bound_that_makes_no_sense_is_refused(name: str) -> None:
  with pytest.raises(errors.ConfigError, match=f'{name}=-1'):
    limits_lib.Limits(**{name: -1})


# What is refused.


def _sampled(**sampling: Any) -> pb.GenerateRequest:
  return pb.GenerateRequest(text='x', sampling=pb.SamplingParams(**sampling))


def _vllm_sampled(**sampling: Any) -> vllm.GenerateRequest:
  return vllm.GenerateRequest(
    text='x', sampling_params=vllm.SamplingParams(**sampling)
  )


def _infer(
  *tensors: tuple[str, str, list[int], dict[str, Any]],
  raw: list[bytes] | None = None,
  id: str = '',
  **parameters: str,
) -> oip.ModelInferRequest:
  request = oip.ModelInferRequest(
    model_name='counting', id=id, raw_input_contents=raw or ()
  )
  for name, datatype, shape, contents in (
    ('text_input', 'BYTES', [1], {'bytes_contents': [b'x']}),
    *tensors,
  ):
    request.inputs.add(
      name=name,
      datatype=datatype,
      shape=shape,
      contents=None if raw else contents,
    )
  for name, value in parameters.items():
    request.parameters[name].string_param = value
  return request


def _bytes(name: str, values: list[bytes]) -> Any:
  return name, 'BYTES', [len(values)], {'bytes_contents': values}


_LONG = 3_000_000
# Method, message, what its refusal says.
TOO_MUCH: dict[str, tuple[str, Callable[[], Any], str]] = {
  'text': (
    _SARATHI,
    lambda: pb.GenerateRequest(text='ab ' * _LONG),
    'prompt: has 9,000,000 characters of a prompt: must be at most '
    f'max_prompt_chars={16 * 2**17}',
  ),
  'a long prompt of many outputs': (
    _SARATHI,
    lambda: pb.GenerateRequest(
      token_ids=pb.TokenIds(ids=[5] * 20_000),
      sampling=pb.SamplingParams(n=128, temperature=1, max_tokens=2),
    ),
    f'n=128: has 2,560,000 tokens of a prompt: must be at most max_n_tokens='
    f'{2**21}',
  ),
  'chat text': (
    _SARATHI,
    lambda: pb.GenerateRequest(
      chat=pb.Chat(
        messages=[pb.ChatMessage(role='user', content='ab ' * _LONG)]
      )
    ),
    'max_prompt_chars',
  ),
  'token ids': (
    _SARATHI,
    lambda: pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * _LONG)),
    'max_numbers',
  ),
  'messages': (
    _SARATHI,
    lambda: pb.GenerateRequest(
      chat=pb.Chat(messages=[pb.ChatMessage(role='user', content='x')] * 20_000)
    ),
    'max_messages=16384',
  ),
  'stops': (_SARATHI, lambda: _sampled(stop=['zz'] * 129), 'max_stops=128'),
  'stop chars': (
    _SARATHI,
    lambda: _sampled(stop=['z' * 2000] * 3),
    'has 6,000 characters of all stop strings',
  ),
  'stop ids': (
    _SARATHI,
    lambda: _sampled(stop_token_ids=[1] * 1025),
    'max_stop_token_ids=1024',
  ),
  'biases': (
    _SARATHI,
    lambda: _sampled(logit_bias=dict.fromkeys(range(1025), 1.0)),
    'max_parameters=1024',
  ),
  'allowed ids': (
    _SARATHI,
    lambda: _sampled(allowed_token_ids=[1] * 1025),
    'max_adjusted_token_ids=1024',
  ),
  'bad ids': (
    _SARATHI,
    lambda: _sampled(bad_token_ids=[1] * 1025),
    'max_adjusted_token_ids=1024',
  ),
  'bad words': (
    _SARATHI,
    lambda: _sampled(bad_words=['zz'] * 65),
    'max_bad_words=64',
  ),
  'bad word chars': (
    _SARATHI,
    lambda: _sampled(bad_words=['z' * 2000] * 3),
    'max_bad_word_chars=4096',
  ),
  'logprobs': (
    _SARATHI,
    lambda: _sampled(max_tokens=100_000, logprobs=20),
    'logprobs: has 2,100,000 log-probabilities of all outputs: must be at most '
    'max_logprobs=524288',
  ),
  'logprobs of outputs': (
    _SARATHI,
    lambda: _sampled(max_tokens=65_537, logprobs=0, n=8),
    'has 524,296 log-probabilities',
  ),
  'named logprobs': (
    _SARATHI,
    lambda: _sampled(max_tokens=100_000, logprob_token_ids=[1, 2, 3, 4, 5]),
    'has 600,000 log-probabilities',
  ),
  'vllm logprobs': (
    _VLLM,
    lambda: _vllm_sampled(max_tokens=50_000, logprobs=5, n=2),
    'has 600,000 log-probabilities',
  ),
  'JSON of logprobs': (
    _INFER,
    lambda: _infer(
      sampling_parameters=json.dumps({'max_tokens': 100_000, 'logprobs': 20})
    ),
    'max_logprobs=524288',
  ),
  'request id': (
    _SARATHI,
    lambda: pb.GenerateRequest(text='x', request_id='r' * 257),
    'request_id: has 257 characters',
  ),
  'tier': (
    _SARATHI,
    lambda: pb.GenerateRequest(text='x', tier='t' * _LONG),
    '(length 3,000,000)',
  ),
  'abort': (
    '/sarathi.v1.Sarathi/Abort',
    lambda: pb.AbortRequest(request_ids=['r'] * 1025),
    'max_abort_ids=1024',
  ),
  'vllm text': (
    _VLLM,
    lambda: vllm.GenerateRequest(text='ab ' * _LONG),
    'max_prompt_chars',
  ),
  'vllm ids': (
    _VLLM,
    lambda: vllm.GenerateRequest(
      tokenized=vllm.TokenizedInput(input_ids=[1] * _LONG)
    ),
    'max_numbers',
  ),
  'vllm stops': (
    _VLLM,
    lambda: _vllm_sampled(stop=['zz'] * 129),
    'max_stops=128',
  ),
  'vllm stop chars': (
    _VLLM,
    lambda: _vllm_sampled(stop=['z' * 5000]),
    'max_stop_chars=4096',
  ),
  'vllm request id': (
    _VLLM,
    lambda: vllm.GenerateRequest(text='x', request_id='r' * 257),
    'max_id_chars=256',
  ),
  'vllm logit_bias': (
    _VLLM,
    lambda: _vllm_sampled(logit_bias=dict.fromkeys(range(1025), 1.0)),
    'max_parameters=1024',
  ),
  'vllm abort': (
    '/vllm.grpc.engine.VllmEngine/Abort',
    lambda: vllm.AbortRequest(request_ids=['r'] * 1025),
    'max_abort_ids=1024',
  ),
  'dimensions': (
    _INFER,
    lambda: _infer(('stop', 'BYTES', [2**62] * 60_000, {})),
    'max_dims=8',
  ),
  'inputs': (
    _INFER,
    lambda: _infer(*(_bytes(f't{i}', [b'x']) for i in range(64))),
    'max_tensors=64',
  ),
  'raw ids': (
    _INFER,
    lambda: _infer(
      ('input_ids', 'INT64', [_LONG // 8], {}),
      raw=[b'\1\0\0\0x', b'\0' * _LONG],
    ),
    'max_model_len=131072',
  ),
  'raw booleans': (
    _INFER,
    lambda: _infer(
      ('stream', 'BOOL', [_LONG], {}), raw=[b'\1\0\0\0x', b'\0' * _LONG]
    ),
    'inputs: stream: has 3,000,000 elements of a tensor',
  ),
  'raw stops': (
    _INFER,
    lambda: _infer(
      ('stop_words', 'BYTES', [_LONG // 4], {}),
      raw=[b'\1\0\0\0x', b'\0' * _LONG],
    ),
    'max_stops=128',
  ),
  'tensor of stops': (
    _INFER,
    lambda: _infer(_bytes('stop', [b'z'] * 129)),
    'max_stops=128',
  ),
  'JSON': (
    _INFER,
    lambda: _infer(sampling_parameters='[' * _LONG),
    'max_json_chars=65536',
  ),
  'JSON of stops': (
    _INFER,
    lambda: _infer(sampling_parameters=json.dumps({'stop': ['z'] * 200})),
    'max_stops=128',
  ),
  'inference id': (_INFER, lambda: _infer(id='i' * 257), 'max_id_chars=256'),
  'a parameter': (_INFER, lambda: _infer(stop='z' * 5000), 'max_stop_chars'),
  'a long name': (
    _INFER,
    lambda: _infer(**{'n' * _LONG: ''}),
    '(length 3,000,000)',
  ),
  'model': (
    _INFER,
    lambda: oip.ModelInferRequest(model_name='m' * _LONG),
    '(length 3,000,000)',
  ),
  'control': (
    '/sarathi.v1.Control/Profile',
    lambda: pb.ProfileRequest(num_steps=2**31 - 1),
    'max_profile_steps=1000',
  ),
}


@pytest.fixture(scope='module')
def profiled(tmp_path_factory: pytest.TempPathFactory) -> Any:
  from sarathi_jax.server.protocols import control_v1

  with contextlib.closing(
    fake.RunningServer(
      functools.partial(server_front.make_roomy_engine, 16, 0.0),
      trace_dir=tmp_path_factory.mktemp('trace'),
      hooks=control_v1.Hooks(
        start_profile=lambda folder: None, stop_profile=lambda: None
      ),
    )
  ) as running:
    yield running


@pytest.mark.parametrize('name', TOO_MUCH)
def test_too_much_is_refused_by_name_and_costs_nothing(
  profiled: fake.RunningServer, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
  for work in ('encode', 'apply_chat_template'):
    monkeypatch.setattr(profiled.engine.tokenizer, work, None)
  method, make, says = TOO_MUCH[name]
  code, details, _ = _send(profiled, method, make())
  assert code in (_CODE.INVALID_ARGUMENT, _CODE.NOT_FOUND), details
  assert says in details
  assert len(details) < 600


def test_too_much_in_a_stream_ends_what_it_must(
  roomy: fake.RunningServer,
) -> None:
  code, details, _ = _send(
    roomy, _STREAM, _infer(*(_bytes(f't{i}', [b'x']) for i in range(64)))
  )
  assert code is _CODE.INVALID_ARGUMENT and 'max_tensors=64' in details
  code, _, answers = _send(roomy, _STREAM, _infer(id='i' * 1_000_000))
  assert code is _CODE.OK and len(answers[0]) < 1000
  answer = oip.ModelStreamInferResponse.FromString(answers[0])
  assert 'max_id_chars=256' in answer.error_message


def test_a_client_can_not_call_itself_what_it_likes(
  roomy: fake.RunningServer,
) -> None:
  call = roomy.stub.Generate(
    pb.GenerateRequest(text='x'), metadata=[('x-client-id', 'c' * 5000)]
  )
  with pytest.raises(grpc.RpcError):
    list(call)
  assert call.code() is _CODE.INVALID_ARGUMENT
  # With its tenant's name, as which it is remembered.
  assert 'x-client-id: has 5,0' in call.details()


@pytest.mark.parametrize(
  'value', ['x' * 10**6, '\u4e2d' * 10**6, '"' * 10**6, '\udcff' * 10**6]
)
def test_what_quotes_a_large_value_fits_into_a_trailer(value: str) -> None:
  for error in (
    errors.InvalidRequestError(f'tier={value!r}: no.'),
    errors.InvalidRequestError(value),
    errors.EngineDeadError(value),
  ):
    text = status.of(error)[1]
    sent = urllib.parse.quote(text, safe=string.printable)
    assert len(sent) < 7000 and '(length ' in text


def test_values_are_shown_whole_if_they_are_short() -> None:
  for value in ('a', 1.5, None, ('a', 'b'), {'a': 1}, [1, 2], float('nan')):
    assert errors.shown(value) == repr(value)
  assert errors.shown(list(range(1000))).endswith('...] (length 1,000)')
  assert len(errors.shown(['x' * 1000] * 1000)) < 1200
