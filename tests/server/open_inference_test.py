# SPDX-License-Identifier: Apache-2.0
"""The Open Inference Protocol v2, by its messages alone.

Triton's own client has a process of its own: third_party_test.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import json
from typing import Any

import grpc
import pytest

from sarathi_jax import errors
from sarathi_jax import types
from sarathi_jax.server import open_inference_pb2 as pb
from sarathi_jax.server import open_inference_pb2_grpc
from sarathi_jax.server.protocols import open_inference
from sarathi_jax.server.protocols import open_inference_describe as describe
from sarathi_jax.server.protocols import tensors
from sarathi_jax.server.queue import admission
from tests import sampling_fields
from tests.server import fake

_FIELDS = {
  bool: 'bool_param',
  int: 'int64_param',
  str: 'string_param',
  float: 'double_param',
}


def _stub(running: fake.RunningServer) -> Any:
  return open_inference_pb2_grpc.GRPCInferenceServiceStub(running.channel)


def _request(
  text: str | None = None,
  *,
  ids: list[int] | None = None,
  model_name: str = 'counting',
  **parameters: Any,
) -> Any:
  request = pb.ModelInferRequest(model_name=model_name, id='r')
  if text is not None:
    request.inputs.add(
      name='text_input',
      datatype='BYTES',
      shape=[1],
      contents=pb.InferTensorContents(bytes_contents=[text.encode()]),
    )
  if ids is not None:
    request.inputs.add(
      name='input_ids',
      datatype='INT64',
      shape=[1, len(ids)],
      contents=pb.InferTensorContents(int64_contents=ids),
    )
  for name, value in parameters.items():
    setattr(request.parameters[name], _FIELDS[type(value)], value)
  return request


def _outputs(response: pb.ModelInferResponse) -> dict[str, list[Any]]:
  request = pb.ModelInferRequest(
    raw_input_contents=response.raw_output_contents
  )
  for output in response.outputs:
    request.inputs.add(
      name=output.name, datatype=output.datatype, shape=output.shape
    )
  return tensors.read_inputs(request)


def _infer(running: fake.RunningServer, request: Any) -> dict[str, list[Any]]:
  return _outputs(_stub(running).ModelInfer(request, timeout=fake.TIMEOUT_S))


def _refusal(
  running: fake.RunningServer, request: Any
) -> tuple[grpc.StatusCode, str]:
  with pytest.raises(grpc.RpcError) as caught:
    _stub(running).ModelInfer(request, timeout=fake.TIMEOUT_S)
  return caught.value.code(), caught.value.details()


def _stream(running: fake.RunningServer, *requests: Any) -> list[Any]:
  return list(
    _stub(running).ModelStreamInfer(iter(requests), timeout=fake.TIMEOUT_S)
  )


def test_infer_text(server: fake.RunningServer) -> None:
  outputs = _infer(server, _request('t1 t2', max_tokens=3))
  assert outputs['text_output'][0].split() == [b't3', b't4', b't5']
  assert outputs['output_ids'] == [3, 4, 5]
  assert outputs['finish_reason'] == [b'length']
  assert outputs['logprobs'] == [0.0, 0.0, 0.0]
  assert outputs['prompt_tokens'] == [2]
  assert outputs['completion_tokens'] == [3]
  assert outputs['cached_tokens'] == [0]


def test_several_log_probabilities_are_rows(
  server: fake.RunningServer,
) -> None:
  request = _request(ids=[1, 2, 5], max_tokens=2, logprobs=2, prompt_logprobs=0)
  response = _stub(server).ModelInfer(request, timeout=fake.TIMEOUT_S)
  shapes = {output.name: list(output.shape) for output in response.outputs}
  outputs = _outputs(response)
  assert shapes['told_token_ids'] == shapes['told_logprobs'] == [2, 3]
  assert outputs['told_token_ids'] == [6, 6, 7, 7, 7, 8]
  assert outputs['told_logprobs'] == [0, 0, -1] * 2
  assert outputs['told_ranks'] == [1, 1]
  assert shapes['prompt_told_token_ids'] == [2, 1]
  assert outputs['prompt_told_token_ids'] == [2, 5]
  assert outputs['prompt_told_ranks'] == [1, 3]
  assert 'told_ranks' not in _infer(server, _request(ids=[1], max_tokens=1))


def test_infer_ids(server: fake.RunningServer) -> None:
  assert _infer(server, _request(ids=[7, 8], max_tokens=2))['output_ids'] == [
    9,
    10,
  ]


def _sampled(request: Any) -> types.SamplingParams:
  call = open_inference._Call(request, admission.Limits(), lambda *_: None)
  return types.SamplingParams.from_dict(call.sampling)


def test_every_sampling_field_arrives_as_the_tensor_that_is_described() -> None:
  described = {name: (kind, n) for name, kind, n in describe._INPUTS}
  request = _request('t1')
  for name, value in sampling_fields.EXAMPLES.items():
    datatype, _ = described[name]
    values = list(value) if isinstance(value, tuple) else [value]
    if isinstance(value, dict):
      values = [json.dumps(value)]
    if datatype == 'BYTES':
      values = [text.encode() for text in values]
    request.inputs.add(
      name=name,
      datatype=datatype,
      shape=[len(values)],
      contents=pb.InferTensorContents(**{tensors._TYPES[datatype][0]: values}),
    )
  assert _sampled(request) == types.SamplingParams(**sampling_fields.EXAMPLES)


def test_every_sampling_field_arrives_in_json_and_as_a_parameter() -> None:
  given = sampling_fields.EXAMPLES
  expected = types.SamplingParams(**given)
  assert (
    _sampled(_request('t1', sampling_parameters=json.dumps(given))) == expected
  )
  alone = {
    name: json.dumps(value) if isinstance(value, dict) else value
    for name, value in given.items()
    if not isinstance(value, tuple)
  }
  lists = {
    name: value[:1] for name, value in given.items() if name not in alone
  }
  # A parameter of a list is one of its values.
  some = alone | {name: value[0] for name, value in lists.items()}
  assert _sampled(_request('t1', **some)) == types.SamplingParams(
    **{**given, **lists}
  )


@pytest.mark.parametrize('value', ['[1]', '{', '3', '{"a": 1}', '{"1": "x"}'])
def test_a_bias_that_is_no_map_is_refused(value: str) -> None:
  with pytest.raises(errors.InvalidRequestError, match='logit_bias'):
    _sampled(_request('t1', logit_bias=value))


def test_only_the_outputs_that_are_asked_for(
  server: fake.RunningServer,
) -> None:
  request = _request('t1', max_tokens=3)
  request.outputs.add(name='text_output')
  assert list(_infer(server, request)) == ['text_output']


def test_the_prompt_may_be_in_the_output(server: fake.RunningServer) -> None:
  outputs = _infer(
    server, _request('t1', max_tokens=1, exclude_input_in_output=False)
  )
  assert outputs['text_output'][0].split() == [b't1', b't2'] or (
    outputs['text_output'] == [b't1t2']
  )


def test_parameters_may_be_tensors_and_json(server: fake.RunningServer) -> None:
  request = _request('t1', sampling_parameters='{"ignore_eos": true}')
  request.inputs.add(
    name='max_tokens',
    datatype='INT32',
    shape=[1],
    contents=pb.InferTensorContents(int_contents=[2]),
  )
  request.inputs.add(
    name='temperature',
    datatype='FP32',
    shape=[1, 1],
    contents=pb.InferTensorContents(fp32_contents=[0.5]),
  )
  assert _infer(server, request)['output_ids'] == [2, 3]


def test_stop_strings(server: fake.RunningServer) -> None:
  request = _request('t1')
  request.inputs.add(
    name='stop',
    datatype='BYTES',
    shape=[2],
    contents=pb.InferTensorContents(bytes_contents=[b't9', b't4']),
  )
  outputs = _infer(server, request)
  assert outputs['text_output'][0].split() == [b't2', b't3']
  assert outputs['finish_reason'] == [b'stop']


def test_a_stream_of_requests(server: fake.RunningServer) -> None:
  requests = []
  for i in range(20):
    requests.append(_request(f't{i}', max_tokens=5, stream=i % 2 == 0))
    requests[-1].id = str(i)
  tokens: dict[str, list[int]] = {str(i): [] for i in range(20)}
  finals: dict[str, list[bool]] = {str(i): [] for i in range(20)}
  for response in _stream(server, *requests):
    assert not response.error_message
    infer = response.infer_response
    tokens[infer.id] += _outputs(infer)['output_ids']
    finals[infer.id].append(
      infer.parameters['triton_final_response'].bool_param
    )
  assert tokens == {str(i): list(range(i + 1, i + 6)) for i in range(20)}
  assert all(f == [False] * (len(f) - 1) + [True] for f in finals.values())
  assert all(len(finals[str(i)]) == 1 for i in range(1, 20, 2))


def test_an_error_in_a_stream_ends_its_request_only(
  server: fake.RunningServer,
) -> None:
  bad, good = _request('t1', temperature=-1.0), _request('t1', max_tokens=2)
  bad.id, good.id = 'bad', 'good'
  by_id = {r.infer_response.id: r for r in _stream(server, bad, good)}
  assert 'INVALID_ARGUMENT' in by_id['bad'].error_message
  assert 'temperature' in by_id['bad'].error_message
  assert (
    by_id['bad'].infer_response.parameters['triton_final_response'].bool_param
  )
  assert _outputs(by_id['good'].infer_response)['output_ids'] == [2, 3]


def test_cancelling_a_stream_frees_all(gated: Callable[..., Any]) -> None:
  running, runner = gated()

  def requests() -> Iterator[Any]:
    for i in range(3):
      yield _request(ids=[i], max_tokens=100, stream=True)
    while not call.done():
      import time

      time.sleep(0.01)

  call = _stub(running).ModelStreamInfer(requests())
  running.wait_until_open(3)
  runner.let(3)
  assert next(call).infer_response.id == 'r'
  call.cancel()
  running.wait_until_open(0)
  runner.open()
  fake.wait_until(running.all_pages_are_free)
  assert running.is_alive()


def test_bytes_that_are_no_message_end_a_stream(
  server: fake.RunningServer,
) -> None:
  call = server.channel.stream_stream(
    '/inference.GRPCInferenceService/ModelStreamInfer'
  )(iter([b'\xff']))
  with pytest.raises(grpc.RpcError):
    list(call)
  assert call.code() is grpc.StatusCode.INVALID_ARGUMENT
  assert server.is_alive()


def _bad_requests() -> Iterator[tuple[Any, str]]:
  yield _request(), 'text_input'
  yield _request('t1', ids=[1]), 'text_input'
  yield _request(''), 'empty'
  yield _request(ids=[64]), '64'
  yield _request('t1', unknown=1), 'unknown'
  yield _request('t1', temperature='hot'), 'temperature'
  yield _request('t1', temperature=float('nan')), 'temperature'
  yield _request('t1', max_tokens=2.5), 'max_tokens'
  yield _request('t1', n=2), 'n=2'
  yield _request('t1', stream=True), 'ModelStreamInfer'
  yield _request('t1', stream=1), 'stream'
  yield _request('t1', priority=2**40), 'priority'
  yield _request('t1', sampling_parameters='{'), 'sampling_parameters'
  yield _request('t1', sampling_parameters='[1]'), 'sampling_parameters'
  request = _request('t1')
  request.outputs.add(name='image')
  yield request, 'image'
  request = _request('t1')
  request.inputs[0].shape[0] = 2
  yield request, 'elements'
  request = _request('t1')
  request.inputs[0].datatype = 'FP99'
  yield request, 'FP99'
  request = _request('t1')
  request.inputs[0].contents.bytes_contents[0] = b'\xff'
  yield request, 'UTF-8'
  request = _request('t1')
  request.raw_input_contents.extend([b'', b''])
  yield request, 'raw_input_contents'
  request = _request('t1')
  request.raw_input_contents.append(b'\xff\0\0\0ab')
  yield request, 'cut off'
  request = _request('t1', max_tokens=3)
  request.inputs.append(request.inputs[0])
  yield request, 'twice'


@pytest.mark.parametrize(
  'request_, says', list(_bad_requests()), ids=lambda value: None
)
def test_bad_requests_are_refused(
  server: fake.RunningServer, request_: Any, says: str
) -> None:
  code, details = _refusal(server, request_)
  assert code is grpc.StatusCode.INVALID_ARGUMENT and says in details
  assert server.is_alive()


@pytest.mark.parametrize('name, version', [('x', ''), ('counting', '2')])
def test_an_unknown_model_is_not_found(
  server: fake.RunningServer, name: str, version: str
) -> None:
  request = _request('t1', model_name=name)
  request.model_version = version
  assert _refusal(server, request)[0] is grpc.StatusCode.NOT_FOUND


def test_what_is_told_of_the_model(server: fake.RunningServer) -> None:
  stub = _stub(server)
  assert stub.ServerLive(pb.ServerLiveRequest()).live
  assert stub.ServerReady(pb.ServerReadyRequest()).ready
  assert stub.ModelReady(pb.ModelReadyRequest(name='counting')).ready
  assert not stub.ModelReady(pb.ModelReadyRequest(name='x')).ready
  assert stub.ServerMetadata(pb.ServerMetadataRequest()).name == 'sarathi_jax'
  metadata = stub.ModelMetadata(pb.ModelMetadataRequest(name='counting'))
  assert 'text_input' in [tensor.name for tensor in metadata.inputs]
  config = stub.ModelConfig(pb.ModelConfigRequest(name='counting')).config
  assert config.model_transaction_policy.decoupled
  assert config.output[0] == pb.ModelOutput(
    name='text_output', data_type=pb.TYPE_STRING, dims=[1]
  )
  (model,) = stub.RepositoryIndex(pb.RepositoryIndexRequest()).models
  assert (model.name, model.state) == ('counting', 'READY')


def test_statistics(server: fake.RunningServer) -> None:
  stub = _stub(server)

  def statistics() -> Any:
    return stub.ModelStatistics(
      pb.ModelStatisticsRequest(name='counting')
    ).model_stats[0]

  before = statistics()
  _infer(server, _request('t1', max_tokens=3))
  after = statistics()
  assert after.inference_count == before.inference_count + 1
  assert after.execution_count > before.execution_count
  assert after.inference_stats.success.ns > before.inference_stats.success.ns


def test_a_response_of_a_stream_says_when_to_try_again(
  gated: Callable[..., Any],
) -> None:
  running, runner = gated(
    max_num_seqs=1, config={'limits': admission.Limits(max_waiting=1)}
  )
  calls = [running.generate(token_ids=[1], sampling={'max_tokens': 3})]
  runner.let(1)
  assert next(calls[0]).token_ids[0] == 2
  calls.append(running.generate(token_ids=[1], sampling={'max_tokens': 3}))
  running.wait_until_open(2)
  last = _stream(running, _request(ids=[1]))[-1]
  assert last.error_message.startswith('[RESOURCE_EXHAUSTED]')
  parameters = last.infer_response.parameters
  assert int(parameters['retry-after'].string_param) > 0
  assert int(parameters['grpc-retry-pushback-ms'].string_param) > 0
  runner.open()
