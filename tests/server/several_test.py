# SPDX-License-Identifier: Apache-2.0
"""Several outputs of a prompt, over every protocol."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import functools
import pathlib
from typing import Any
from unittest import mock

import grpc
import openai
import pytest
from smg_grpc_proto import vllm_engine_pb2
from smg_grpc_proto import vllm_engine_pb2_grpc

from sarathi_jax import errors
from sarathi_jax import types
from sarathi_jax.server import open_inference_pb2
from sarathi_jax.server import open_inference_pb2_grpc
from sarathi_jax.server import sarathi_pb2 as pb
from sarathi_jax.server.queue import admission
from sarathi_jax.server.queue import outbox
from tests.server import fake
from tests.server import http_client
from tests.server.http_client import BODIES
from tests.server.http_client import Client
from tests.server.http_client import text_of


class Striding(fake.GatedRunner):
  """Output i begins with the prompt's last token + 1 + 10 * i."""

  def launch(self, batch: types.ScheduledBatch) -> types.Sampled:
    sampled = super().launch(batch)
    first = len(batch.chunks)
    for place, fork in enumerate(batch.forks, first):
      index = int(fork.chunk.request_id.rpartition('/')[2])
      (token,) = sampled.tokens[place]
      token = (token + 10 * index) % self.vocab_size
      sampled.tokens[place] = (token,)
      self._last[fork.chunk.slot] = token
    return sampled


def words(first: int, num: int = 4) -> str:
  return ''.join(f' t{first + i}' for i in range(num))


OUTPUTS = [words(3), words(13), words(23)]  # of 't1 t2', of 4 tokens each
ASK = {'n': 3, 'temperature': 1}


@pytest.fixture(scope='module')
def made() -> dict[str, Striding]:
  return {}


@pytest.fixture(scope='module')
def running(
  chat_folder: pathlib.Path, made: dict[str, Striding]
) -> Iterator[fake.RunningServer]:
  def make_runner(*args: int) -> Striding:
    made['runner'] = Striding(*args)
    made['runner'].open()
    return made['runner']

  with contextlib.closing(
    fake.RunningServer(
      functools.partial(
        fake.make_engine,
        make_runner,
        tokenizer_folder=chat_folder,
        max_num_seqs=8,
        token_budget=16,
      ),
      http_port=0,
      limits=admission.Limits(max_n=6),
    )
  ) as running:
    yield running
    made['runner'].open()


@pytest.fixture(scope='module')
def client(running: fake.RunningServer) -> Iterator[Client]:
  with contextlib.closing(Client.of(running)) as client:
    yield client


@pytest.mark.parametrize('kind', BODIES)
def test_choices_are_numbered_and_the_prompt_counts_once(
  client: Client, kind: str
) -> None:
  path, body = BODIES[kind]
  status, whole = client.json(path, {**body, **ASK})
  assert status == 200
  assert [c['index'] for c in whole['choices']] == [0, 1, 2]
  assert [text_of(c) for c in whole['choices']] == OUTPUTS
  assert {c['finish_reason'] for c in whole['choices']} == {'length'}
  usage = {
    'prompt_tokens': 2,
    'completion_tokens': 12,
    'total_tokens': 14,
    # One, where the same was asked before.
    'prompt_tokens_details': {'cached_tokens': mock.ANY},
  }
  assert whole['usage'] == usage
  options = {'stream_options': {'include_usage': True}}
  *events, last = client.events(path, {**body, **ASK, **options})
  assert last['choices'] == [] and last['usage'] == usage
  choices = [event['choices'][0] for event in events]
  for index, text in enumerate(OUTPUTS):
    mine = [c for c in choices if c['index'] == index]
    assert ''.join(map(text_of, mine)) == text
    assert [bool(c['finish_reason']) for c in mine] == [False] * (
      len(mine) - 1
    ) + [True]
    if kind == 'chat':
      roles = [c['delta'].get('role') for c in mine]
      assert roles == ['assistant'] + [None] * (len(mine) - 1)


def test_several_prompts_of_several_outputs(client: Client) -> None:
  """Choice i of prompt p is number p * n + i."""
  body = {
    **http_client.PROMPT,
    **ASK,
    'n': 2,
    'prompt': [[1, 2], [30]],
    'echo': True,
    'return_token_ids': True,
  }
  expected = ['t1 t2' + words(3), 't1 t2' + words(13)]
  expected += ['t30' + words(31), 't30' + words(41)]
  _, whole = client.json('/v1/completions', body)
  assert [c['index'] for c in whole['choices']] == [0, 1, 2, 3]
  assert [c['text'] for c in whole['choices']] == expected
  prompts = [c['prompt_token_ids'] for c in whole['choices']]
  assert prompts == [[1, 2], [1, 2], [30], [30]]
  assert whole['usage']['prompt_tokens'] == 3
  assert whole['usage']['completion_tokens'] == 16
  told = [''] * 4
  for event in client.events('/v1/completions', body):
    (choice,) = event['choices']
    told[choice['index']] += choice['text']
  assert told == expected


def test_of_a_prompt_is_told_once(client: Client) -> None:
  body = {**http_client.PROMPT, **ASK, 'prompt_logprobs': 0}
  _, whole = client.json('/v1/completions', body)
  told = [choice.get('prompt_logprobs') for choice in whole['choices']]
  assert told[0] is not None and told[1:] == [None, None]
  body = {
    **http_client.CHAT,
    **ASK,
    'prompt_logprobs': 0,
    'return_token_ids': True,
  }
  _, whole = client.json('/v1/chat/completions', body)
  assert len(whole['prompt_logprobs']) == 2
  assert whole['prompt_token_ids'] == [1, 2]
  events = client.events('/v1/chat/completions', body)
  assert [bool(e.get('prompt_logprobs')) for e in events].count(True) == 1
  assert ['prompt_token_ids' in e for e in events].count(True) == 1


def test_an_output_that_ends_early_ends_alone(client: Client) -> None:
  _, whole = client.json(
    '/v1/completions', {**http_client.PROMPT, **ASK, 'stop': ['t14']}
  )
  reasons = [c['finish_reason'] for c in whole['choices']]
  assert reasons == ['length', 'stop', 'length']
  assert [c['text'] for c in whole['choices']] == [words(3), ' t13 ', words(23)]


def test_openais_client(running: fake.RunningServer) -> None:
  with openai.OpenAI(
    base_url=f'http://127.0.0.1:{running.server.http_port}/v1',
    api_key='none',
    max_retries=0,
  ) as ours:
    body: Any = {**http_client.CHAT, 'temperature': 1}
    whole = ours.chat.completions.create(**body, n=2)
    assert [c.message.content for c in whole.choices] == OUTPUTS[:2]
    texts = ['', '']
    for event in ours.chat.completions.create(**body, n=2, stream=True):
      for choice in event.choices:
        texts[choice.index] += choice.delta.content or ''
    assert texts == OUTPUTS[:2]
    body = {**http_client.PROMPT, 'temperature': 1}
    told = ours.completions.create(**body, n=2)
    assert [c.text for c in told.choices] == OUTPUTS[:2]
    with pytest.raises(openai.BadRequestError, match='best_of=4'):
      ours.completions.create(**body, n=2, best_of=4)


@pytest.mark.parametrize(
  ('fields', 'words'),
  [
    ({'n': 2, 'temperature': 0}, 'n=2: must be 1 with temperature=0'),
    ({'n': 0}, 'n=0: must be an integer >= 1'),
    ({'n': 7}, 'n: has 7 outputs of a prompt: must be at most max_n=6'),
    ({'best_of': 2}, 'best_of=2'),
    ({'n': 2, 'echo': True, 'logprobs': 0}, 'echo=True: with logprobs, n=2'),
  ],
)
def test_what_is_refused(
  client: Client, fields: dict[str, Any], words: str
) -> None:
  body = {**http_client.PROMPT, 'temperature': 1, **fields}
  status, message, param = client.refused('/v1/completions', body)
  assert status == 400 and words in message and param in fields


def test_our_protocol(running: fake.RunningServer) -> None:
  tokens: dict[int, list[int]] = {0: [], 1: [], 2: []}
  num_finished = 0
  for response in running.generate(
    token_ids=[1, 2], sampling={**ASK, 'max_tokens': 3}
  ):
    tokens[response.index] += response.token_ids
    if response.HasField('finished'):
      num_finished += 1
      assert response.finished.usage.prompt_tokens == 2
      assert response.finished.usage.completion_tokens == 3
  assert tokens == {0: [3, 4, 5], 1: [13, 14, 15], 2: [23, 24, 25]}
  assert num_finished == 3


@pytest.mark.parametrize('stream', [False, True])
def test_vllms_protocol(running: fake.RunningServer, stream: bool) -> None:
  stub: Any = vllm_engine_pb2_grpc.VllmEngineStub(running.channel)
  messages = vllm_engine_pb2
  responses = list(
    stub.Generate(
      messages.GenerateRequest(
        tokenized=messages.TokenizedInput(input_ids=[1, 2]),
        stream=stream,
        sampling_params=messages.SamplingParams(
          n=3, temperature=1, max_tokens=3
        ),
      ),
      timeout=fake.TIMEOUT_S,
    )
  )
  wholes = {
    r.complete.index: list(r.complete.output_ids)
    for r in responses
    if r.HasField('complete')
  }
  assert wholes == {0: [3, 4, 5], 1: [13, 14, 15], 2: [23, 24, 25]}
  assert all(
    r.complete.prompt_tokens == 2 for r in responses if r.HasField('complete')
  )
  chunks: dict[int, list[int]] = {}
  for response in responses:
    if response.HasField('chunk'):
      chunks.setdefault(response.chunk.index, []).extend(
        response.chunk.token_ids
      )
  assert chunks == (wholes if stream else {})


def _infer_request(**parameters: Any) -> Any:
  request = open_inference_pb2.ModelInferRequest(model_name='counting', id='r')
  request.inputs.add(
    name='input_ids',
    datatype='INT64',
    shape=[2],
    contents=open_inference_pb2.InferTensorContents(int64_contents=[1, 2]),
  )
  for name, value in parameters.items():
    field = 'bool_param' if isinstance(value, bool) else 'int64_param'
    setattr(request.parameters[name], field, value)
  return request


@pytest.mark.parametrize('stream', [False, True])
def test_the_open_inference_protocol(
  running: fake.RunningServer, stream: bool
) -> None:
  stub: Any = open_inference_pb2_grpc.GRPCInferenceServiceStub(running.channel)
  responses = [
    r.infer_response
    for r in stub.ModelStreamInfer(
      iter([_infer_request(n=3, max_tokens=3, stream=stream)]),
      timeout=fake.TIMEOUT_S,
    )
  ]
  texts = dict.fromkeys(range(3), '')
  for response in responses:
    named = {
      output.name: content
      for output, content in zip(
        response.outputs, response.raw_output_contents, strict=True
      )
    }
    texts[int.from_bytes(named['index'], 'little')] += named['text_output'][
      4:
    ].decode()
  assert texts == {i: words(3 + 10 * i, 3) for i in range(3)}
  finals = [r.parameters['triton_final_response'].bool_param for r in responses]
  assert finals == [False] * (len(finals) - 1) + [True]
  assert stream or len(responses) == 3


def test_one_response_has_no_place_for_several(
  running: fake.RunningServer,
) -> None:
  stub: Any = open_inference_pb2_grpc.GRPCInferenceServiceStub(running.channel)
  with pytest.raises(grpc.RpcError) as caught:
    stub.ModelInfer(_infer_request(n=2), timeout=fake.TIMEOUT_S)
  assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
  assert 'n=2: ModelInfer has one response' in caught.value.details()


def _held(
  running: fake.RunningServer, made: dict[str, Striding], **fields: Any
) -> Any:
  """A request of three outputs that is running, and goes on if let."""
  made['runner'].close()
  call = running.generate(
    token_ids=[1, 2], sampling={**ASK, 'max_tokens': 100}, **fields
  )
  fake.wait_until(lambda: running.server.frontend.num_open == 1)
  made['runner'].let(2)
  first = [next(call).index for _ in range(3)]
  assert sorted(first) == [0, 1, 2]
  return call


def test_an_abort_finishes_every_output(
  running: fake.RunningServer, made: dict[str, Striding]
) -> None:
  call = _held(running, made, request_id='x')
  reply = running.stub.Abort.future(pb.AbortRequest(request_ids=['x']))
  fake.step_until_done(reply, made['runner'])
  made['runner'].open()
  assert reply.result().aborted == ['x']
  ends = {
    r.index: r.finished.finish_reason
    for r in call
    if r.finished.usage.prompt_tokens
  }
  assert ends == dict.fromkeys(range(3), pb.FINISH_REASON_ABORT)
  running.assert_nothing_is_left()


def test_who_leaves_ends_every_output(
  running: fake.RunningServer, made: dict[str, Striding]
) -> None:
  call = _held(running, made)
  call.cancel()
  made['runner'].open()
  running.assert_nothing_is_left()


def test_a_step_that_fails_ends_the_request(
  running: fake.RunningServer, made: dict[str, Striding]
) -> None:
  call = _held(running, made)
  made['runner'].fault = RuntimeError('gone')
  made['runner'].open()
  with pytest.raises(grpc.RpcError):
    list(call)
  assert call.code() is grpc.StatusCode.INTERNAL
  running.assert_nothing_is_left()


def _request(name: str, n: int, client: str = '') -> types.Request:
  return types.Request(
    request_id=name,
    prompt_token_ids=(1,) * 5,
    sampling=types.SamplingParams(n=n),
    client=client,
  )


def test_the_queue_counts_outputs() -> None:
  queue = admission.Queue(admission.Limits(max_waiting=4))

  def push(name: str, n: int) -> None:
    queue.push(outbox.Stream(_request(name, n), lambda stream: None))

  push('a', 3)
  assert (queue.num_outputs, queue.num_tokens, len(queue)) == (3, 5, 1)
  with pytest.raises(errors.CapacityError, match='with 3 requests'):
    push('b', 2)
  push('c', 1)
  queue.remove('a')
  push('d', 3)
  assert (queue.num_outputs, queue.num_tokens, len(queue)) == (4, 10, 2)


def test_a_client_is_charged_for_all_its_outputs() -> None:
  """Else it would be served n times as much as others."""
  queue = admission.Queue(admission.Limits())
  for i in range(2):
    for name, n in (('many', 8), ('one', 1)):
      queue.push(outbox.Stream(_request(f'{name}{i}', n, name), lambda s: None))
  begun = [queue.pop().request for _ in range(2)]
  for request in begun:
    for _ in range(request.sampling.n):  # each output at its end
      queue.charge(request, 0, 10)
  assert queue.pop().request.request_id == 'one1'


class _Engine:
  """Has room for some outputs."""

  def __init__(self, num: int) -> None:
    self.num = num

  def clock(self) -> float:
    return 0.0

  def room(self, priority: int) -> tuple[int, int]:
    return self.num, 1000

  cache_aware_window = 1

  def num_missing(self, request: types.Request) -> int:
    return len(request.prompt_token_ids)


def test_no_more_begin_than_have_slots() -> None:
  queue = admission.Queue(admission.Limits())
  for name in 'abc':
    queue.push(outbox.Stream(_request(name, 3), lambda s: None))
  engine: Any = _Engine(5)
  begun = [stream.request.request_id for stream, _ in queue.begin(engine)]
  assert begun == ['a', 'b']  # The scheduler waits for the slots of b.
  assert not queue.has_room


def _delta(index: int, *tokens: int, **fields: Any) -> types.OutputDelta:
  return types.OutputDelta(
    'r',
    ''.join(map(str, tokens)),
    tokens,
    (0.0,) * len(tokens),
    output_index=index,
    **fields,
  )


def test_what_waits_is_merged_by_output(running: fake.RunningServer) -> None:
  stream = outbox.Stream(_request('r', 3), lambda s: None)
  length = types.FinishReason.LENGTH
  for delta in (
    _delta(0, 1),
    _delta(1, 5),
    _delta(0, 2, finish_reason=length, num_left=2),
    _delta(2, 8),
    _delta(1, 6),
    _delta(2, 9, finish_reason=length, num_left=1),
    _delta(1, 7, finish_reason=length),
  ):
    stream.put(delta)

  async def read() -> list[types.OutputDelta]:
    return [delta async for delta in stream]

  got = running.run(read())
  assert [(d.output_index, d.token_ids, d.num_left) for d in got] == [
    (0, (1, 2), 2),
    (1, (5, 6, 7), 1),
    (2, (8, 9), 0),
  ]
  assert [d.ends_request for d in got] == [False, False, True]
  assert stream.num_tokens == [2, 3, 2] and stream.is_closed


def test_an_abort_stands_for_the_outputs_that_went_on(
  running: fake.RunningServer,
) -> None:
  stream = outbox.Stream(_request('r', 3), lambda s: None)
  stream.put(_delta(1, 5, finish_reason=types.FinishReason.STOP, num_left=2))
  stream.put(_delta(0, finish_reason=types.FinishReason.ABORT))

  async def read() -> list[types.OutputDelta]:
    return [delta async for delta in stream]

  got = running.run(read())
  assert [(d.output_index, d.finish_reason, d.num_left) for d in got] == [
    (0, types.FinishReason.ABORT, 2),
    (1, types.FinishReason.STOP, 1),
    (2, types.FinishReason.ABORT, 0),
  ]
