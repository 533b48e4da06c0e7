# SPDX-License-Identifier: Apache-2.0
"""vllm.grpc.engine.VllmEngine, driven by the stubs of smg-grpc-proto."""

from __future__ import annotations

from collections.abc import Callable
import hashlib
import io
import json
from typing import Any
import zipfile

import grpc
import pytest
from smg_grpc_proto import vllm_engine_pb2 as pb
from smg_grpc_proto import vllm_engine_pb2_grpc
from smg_grpc_proto.generated import common_pb2

from sarathi_jax import types
from sarathi_jax.server.protocols import vllm_engine
from tests import sampling_fields
from tests.server import fake

_NAMES = frozenset(pb.SamplingParams.DESCRIPTOR.fields_by_name)


def _stub(running: fake.RunningServer) -> Any:
  return vllm_engine_pb2_grpc.VllmEngineStub(running.channel)


def _generate(
  running: fake.RunningServer, ids: list[int] | None = None, **fields: Any
) -> Any:
  sampling = fields.pop('sampling', {})
  if ids is not None:
    fields['tokenized'] = pb.TokenizedInput(input_ids=ids)
  return _stub(running).Generate(
    pb.GenerateRequest(sampling_params=pb.SamplingParams(**sampling), **fields),
    timeout=fake.TIMEOUT_S,
  )


def _refusal(call: Any) -> tuple[grpc.StatusCode, str]:
  with pytest.raises(grpc.RpcError):
    list(call)
  return call.code(), call.details()


def test_a_stream_has_deltas_and_then_the_whole(
  server: fake.RunningServer,
) -> None:
  *chunks, last = list(
    _generate(server, [1, 2, 3], stream=True, sampling={'max_tokens': 4})
  )
  assert all(r.WhichOneof('response') == 'chunk' for r in chunks)
  assert [t for r in chunks for t in r.chunk.token_ids] == [4, 5, 6, 7]
  assert {r.chunk.prompt_tokens for r in chunks} == {3}
  assert sum(r.chunk.completion_tokens for r in chunks) == 4
  assert last.complete == pb.GenerateComplete(
    output_ids=[4, 5, 6, 7],
    finish_reason='length',
    prompt_tokens=3,
    completion_tokens=4,
  )


def test_without_a_stream_there_is_one_message(
  server: fake.RunningServer,
) -> None:
  (response,) = list(
    _generate(server, [1], sampling={'max_tokens': 3, 'logprobs': 0})
  )
  assert list(response.complete.output_ids) == [2, 3, 4]
  logprobs = response.complete.output_logprobs
  assert list(logprobs.token_ids) == [2, 3, 4]
  assert list(logprobs.token_logprobs) == [0.0, 0.0, 0.0]


def test_likeliest_tokens_and_prompts(server: fake.RunningServer) -> None:
  """After t, t + 1 is the likeliest, and t + 1 + d has -d; see FakeRunner."""
  for stream in (False, True):
    responses = _generate(
      server,
      [1, 2, 5],
      stream=stream,
      sampling={'max_tokens': 2, 'logprobs': 2, 'prompt_logprobs': 1},
    )
    parts = [
      getattr(response, response.WhichOneof('response'))
      for response in responses
    ]
    tops = [
      (list(top.token_ids), list(top.values))
      for part in (parts[:-1] if stream else parts)
      for top in part.output_logprobs.top_logprobs
    ]
    assert tops == [([6, 7], [0, -1]), ([7, 8], [0, -1])]
    for part in (parts[0], parts[-1]):
      told = part.input_logprobs
      assert list(told.token_ids) == [1, 2, 5]
      assert not told.token_logprobs[0].HasField('value')
      assert [at.value for at in told.token_logprobs[1:]] == [0, -2]
      assert [list(top.token_ids) for top in told.top_logprobs] == [
        [],
        [2],
        [3],
      ]
    assert not any(part.HasField('input_logprobs') for part in parts[1:-1])


def test_logprobs_come_only_if_asked(server: fake.RunningServer) -> None:
  (response,) = list(_generate(server, [1], sampling={'max_tokens': 3}))
  assert not response.complete.HasField('output_logprobs')


def test_text_and_stop_strings(server: fake.RunningServer) -> None:
  (response,) = list(
    _generate(server, text='t1 t2', sampling={'max_tokens': 50, 'stop': ['t5']})
  )
  assert list(response.complete.output_ids) == [3, 4, 5]
  assert response.complete.finish_reason == 'stop'
  assert response.complete.matched_stop_str == 't5'


def test_a_stop_token_is_named(server: fake.RunningServer) -> None:
  (response,) = list(
    _generate(server, [1], sampling={'max_tokens': 50, 'stop_token_ids': [4]})
  )
  assert response.complete.matched_token_id == 4


def test_unset_max_tokens_fill_the_context(server: fake.RunningServer) -> None:
  (response,) = list(_generate(server, [1], sampling={'ignore_eos': True}))
  assert response.complete.completion_tokens == 127


def test_zeros_are_defaults() -> None:
  assert vllm_engine.sampling_of(pb.SamplingParams()) == types.SamplingParams(
    max_tokens=None,
    temperature=1.0,
    top_p=1.0,
    top_k=0,
    min_p=0.0,
    skip_special_tokens=False,
  )
  assert (
    vllm_engine.sampling_of(pb.SamplingParams(temperature=0.0)).temperature == 0
  )


def test_every_field_arrives() -> None:
  fields = sampling_fields.EXAMPLES
  given = {name: value for name, value in fields.items() if name in _NAMES}
  assert fields.keys() - given.keys() == {
    'allowed_token_ids',
    'bad_token_ids',
    'bad_words',
    'logprob_token_ids',
    'logprobs_mode',
    'structured_outputs',
  }
  assert vllm_engine.sampling_of(
    pb.SamplingParams(**given)
  ) == types.SamplingParams(**given)


@pytest.mark.parametrize(
  'field, value',
  [
    *(
      (field, value)
      for field, value in sampling_fields.NOT_SUPPORTED
      if value and field in _NAMES - {vllm_engine._NO_EFFECT}
    ),
    ('json_schema', '{'),
    ('json_schema', '{"type": "strin"}'),
    ('regex', '['),
    ('grammar', 'a'),
    ('structural_tag', 'a'),
    ('choice', pb.ChoiceConstraint()),
  ],
)
def test_what_can_not_be_served_is_refused_by_name(
  server: fake.RunningServer, field: str, value: Any
) -> None:
  code, details = _refusal(_generate(server, [1], sampling={field: value}))
  assert code is grpc.StatusCode.INVALID_ARGUMENT and field in details


@pytest.mark.parametrize(
  'field, value',
  [
    ('temperature', -1.0),
    ('temperature', float('nan')),
    ('top_p', 1.5),
    ('top_p', -0.5),
    ('min_p', 2.0),
    ('max_tokens', 0),
    ('logprobs', 21),
    ('logprobs', -1),
    ('prompt_logprobs', -1),
    ('stop', ['']),
    ('stop_token_ids', [64]),
  ],
)
def test_a_bad_value_is_refused_by_name(
  server: fake.RunningServer, field: str, value: Any
) -> None:
  code, details = _refusal(_generate(server, [1], sampling={field: value}))
  assert code is grpc.StatusCode.INVALID_ARGUMENT and field in details


@pytest.mark.parametrize(
  'fields, says',
  [
    ({}, 'input'),
    ({'ids': []}, 'empty'),
    ({'ids': [64]}, '64'),
    ({'text': ''}, 'empty'),
    ({'ids': [1] * 128}, 'max_model_len'),
    ({'ids': [1], 'data_parallel_rank': 3}, 'data_parallel_rank'),
    ({'ids': [1], 'kv_transfer_params_json': '{}'}, 'kv_transfer_params_json'),
    ({'ids': [1], 'media_refs': pb.MediaRefs()}, 'media_refs'),
  ],
)
def test_a_bad_input_is_refused(
  server: fake.RunningServer, fields: dict[str, Any], says: str
) -> None:
  code, details = _refusal(_generate(server, **fields))
  assert code is grpc.StatusCode.INVALID_ARGUMENT and says in details


def test_abort_ends_a_stream(gated: Callable[..., Any]) -> None:
  running, runner = gated()
  call = _generate(running, [1], request_id='a', stream=True)
  runner.let(1)
  assert next(call).chunk.token_ids[0] == 2
  reply = _stub(running).Abort.future(pb.AbortRequest(request_ids=['a', 'b']))
  fake.step_until_done(reply, runner)
  assert list(call)[-1].complete.finish_reason == 'abort'
  runner.open()
  fake.wait_until(running.all_pages_are_free)


def test_health_and_info(server: fake.RunningServer) -> None:
  stub = _stub(server)
  assert stub.HealthCheck(pb.HealthCheckRequest()).healthy
  model = stub.GetModelInfo(pb.GetModelInfoRequest())
  assert (
    model.served_model_name,
    model.max_context_length,
    model.max_req_input_len,
    model.vocab_size,
  ) == ('counting', 128, 127, 64)
  assert model.is_generation and list(model.eos_token_ids) == [60]
  assert json.loads(model.default_sampling_params_json) == {}
  info = stub.GetServerInfo(pb.GetServerInfoRequest())
  assert (
    info.server_type,
    info.active_requests,
    info.is_paused,
    info.data_parallel_size,
  ) == ('sarathi-grpc', 0, False, 1)
  assert info.uptime_seconds > 0


def test_loads(gated: Callable[..., Any]) -> None:
  running, runner = gated(max_num_seqs=1)
  calls = [_generate(running, [1, 2, 3], stream=True) for _ in range(3)]
  running.wait_until_open(3)
  thread = running.server.frontend.engine_thread
  fake.wait_until(lambda: thread.num_queued == 2)
  reply = _stub(running).GetLoads.future(pb.GetLoadsRequest())
  fake.step_until_done(reply, runner)
  (load,) = reply.result().loads
  assert (load.num_running_reqs, load.num_waiting_reqs) == (1, 2)
  assert load.num_waiting_uncached_tokens == 6
  assert 0 < load.num_used_tokens < load.max_total_num_tokens == 256
  assert load.utilization == 1
  for call in calls:
    call.cancel()


def test_the_tokenizer_comes_as_a_zip(server: fake.RunningServer) -> None:
  chunks = list(_stub(server).GetTokenizer(common_pb2.GetTokenizerRequest()))
  data = b''.join(chunk.data for chunk in chunks)
  assert chunks[-1].sha256 == hashlib.sha256(data).hexdigest()
  assert not any(chunk.sha256 for chunk in chunks[:-1])
  with zipfile.ZipFile(io.BytesIO(data)) as archive:
    assert 't63' in json.loads(archive.read('tokenizer.json'))['model']['vocab']
    assert 'model_type' in json.loads(archive.read('config.json'))


@pytest.mark.parametrize(
  'method, request_',
  [
    ('Embed', pb.EmbedRequest()),
    ('StartProfile', common_pb2.StartProfileRequest()),
  ],
)
def test_the_rest_is_unimplemented(
  server: fake.RunningServer, method: str, request_: Any
) -> None:
  with pytest.raises(grpc.RpcError) as caught:
    reply = getattr(_stub(server), method)(request_)
    list(reply)
  assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
