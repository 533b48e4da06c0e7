# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities over OpenAI's HTTP, our own.

After t, token t + 1 + d has the log-probability -d; see FakeRunner.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import json
import math
import threading
from typing import Any

import pytest
from smg_grpc_proto import vllm_engine_pb2
from smg_grpc_proto import vllm_engine_pb2_grpc

from sarathi_jax import types
from sarathi_jax.server import open_inference_pb2
from sarathi_jax.server import open_inference_pb2_grpc
from sarathi_jax.server import sarathi_pb2 as pb
from sarathi_jax.server.guard import limits
from sarathi_jax.server.http import answers
from sarathi_jax.server.http import completions
from sarathi_jax.server.protocols import open_inference
from sarathi_jax.server.protocols import sarathi_v1
from sarathi_jax.server.protocols import vllm_engine
from sarathi_jax.server.queue import pausing
from tests.server import fake
from tests.server.http_client import BODIES
from tests.server.http_client import Client


def _whole(client: Client, kind: str, **fields: Any) -> Any:
  path, body = BODIES[kind]
  status, told = client.json(path, {**body, **fields})
  assert status == 200, told
  return told


def _merged(events: list[Any], *names: str) -> list[Any]:
  """The lists of this name in all pieces, one after another."""
  found = []
  for event in events:
    part = event['choices'][0]
    for name in names:
      part = part[name]
    found += part
  return found


def test_the_likeliest_tokens_of_a_chat(client: Client) -> None:
  asked = dict(logprobs=True, top_logprobs=2, max_tokens=2)
  content = _whole(client, 'chat', **asked)['choices'][0]['logprobs']['content']
  assert [at['token'] for at in content] == ['t3', 't4']
  assert content[0]['top_logprobs'] == [
    {'token': 't3', 'logprob': 0.0, 'bytes': [116, 51]},
    {'token': 't4', 'logprob': -1.0, 'bytes': [116, 52]},
  ]
  path, body = BODIES['chat']
  events = client.events(path, {**body, **asked})
  assert _merged(events, 'logprobs', 'content') == content


def test_the_likeliest_tokens_of_a_completion(client: Client) -> None:
  asked = dict(logprobs=1, max_tokens=2, prompt=[5, 7])
  told = _whole(client, 'text', **asked)['choices'][0]['logprobs']
  expected = {
    'tokens': ['t8', 't9'],
    'token_logprobs': [0.0, 0.0],
    'top_logprobs': [{'t8': 0.0}, {'t9': 0.0}],
    'text_offset': [0, 2],
  }
  assert told == expected
  path, body = BODIES['text']
  events = client.events(path, {**body, **asked})
  assert _merged(events, 'logprobs', 'top_logprobs') == told['top_logprobs']


def test_where_tokens_begin_is_the_same_in_pieces() -> None:
  """Some tokens have a text that is held back, or not shown at all."""
  engine = fake.make_engine()
  body = {'prompt': [1], 'logprobs': 0}
  call = completions.FORM.read(body, engine.info, limits.without())
  choice = answers.Answer(completions.FORM, call, engine, 'id').choice(
    0, [1], (1,)
  )
  pieces = [
    choice.add(types.OutputDelta('id', text, tokens, (0.0,) * len(tokens)))
    for text, tokens in (('', (2, 3)), ('t2 t3 t4', (4,)), (' t5', (5,)))
  ]
  offsets = [piece['logprobs']['text_offset'] for piece in pieces if piece]
  assert offsets == [[0, 1], [2], [3]]


@pytest.mark.parametrize('kind', BODIES)
def test_tokens_that_are_named(client: Client, kind: str) -> None:
  """Told without `logprobs`, too, or they would be asked for in vain."""
  told = _whole(client, kind, logprob_token_ids=[9, 3, 9], max_tokens=1)
  (choice,) = told['choices']
  if kind == 'text':
    assert choice['logprobs']['top_logprobs'] == [{'t3': 0.0, 't9': -6.0}]
  else:
    (at,) = choice['logprobs']['content']
    assert [(o['token'], o['logprob']) for o in at['top_logprobs']] == [
      ('t9', -6.0),
      ('t3', 0.0),
    ]


@pytest.mark.parametrize('stream', [False, True])
@pytest.mark.parametrize('max_tokens', [0, 1])
def test_echo_scores_a_prompt(
  client: Client, stream: bool, max_tokens: int
) -> None:
  """As lm_eval asks for the likelihood of a text."""
  asked = dict(prompt=[1, 2, 5], echo=True, logprobs=2, max_tokens=max_tokens)
  path, body = BODIES['text']
  if stream:
    events = client.events(path, {**body, **asked})
    told = {
      name: _merged(events, 'logprobs', name)
      for name in ('tokens', 'token_logprobs', 'top_logprobs', 'text_offset')
    }
    text = ''.join(event['choices'][0]['text'] for event in events)
  else:
    whole = _whole(client, 'text', **asked)
    (choice,) = whole['choices']
    told, text = choice['logprobs'], choice['text']
    assert choice['finish_reason'] == 'length'
    assert whole['usage'] == {
      'prompt_tokens': 3,
      'completion_tokens': max_tokens,
      'total_tokens': 3 + max_tokens,
      'prompt_tokens_details': {'cached_tokens': 0},
    }
  rest = slice(3 + max_tokens)
  assert text == 't1 t2 t5' + (' t6' if max_tokens else '')
  assert told == {
    'tokens': ['t1', 't2', 't5', 't6'][rest],
    'token_logprobs': [None, 0.0, -2.0, 0.0][rest],
    'top_logprobs': [
      None,
      {'t2': 0.0, 't3': -1.0},
      {'t5': -2.0, 't3': 0.0, 't4': -1.0},
      {'t6': 0.0, 't7': -1.0},
    ][rest],
    'text_offset': [0, 2, 4, 6][rest],
  }


@pytest.mark.parametrize('kind', BODIES)
def test_prompts_in_a_field_of_their_own(client: Client, kind: str) -> None:
  """As vLLM tells them; once, in the first piece of a stream."""
  path, body = BODIES[kind]
  key, prompt = (
    ('prompt', [1, 2, 5])
    if kind == 'text'
    else ('messages', [{'role': 'user', 'content': 't1 t2 t5'}])
  )
  asked = {**body, key: prompt, 'prompt_logprobs': 1}

  def of(whole: Any) -> Any:
    at = whole['choices'][0] if kind == 'text' else whole
    return at.get('prompt_logprobs')

  expected = [
    None,
    {'2': {'logprob': 0.0, 'rank': 1, 'decoded_token': 't2'}},
    {
      '5': {'logprob': -2.0, 'rank': 3, 'decoded_token': 't5'},
      '3': {'logprob': 0.0, 'rank': 1, 'decoded_token': 't3'},
    },
  ]
  assert of(client.json(path, asked)[1]) == expected
  first, *more = client.events(path, asked)
  assert of(first) == expected and not any(map(of, more))


@pytest.mark.parametrize('stream', [False, True])
def test_a_prompt_that_was_never_read_has_no_log_probabilities(
  stepped: Callable[..., Any], stream: bool
) -> None:
  """Its request ends, as an administrator may have it, before its prefill."""
  running, _, client = stepped()
  thread = running.server.frontend.engine_thread
  running.run(thread.pause(pausing.PauseMode.KEEP))  # So it does not begin.
  path, body = BODIES['text']
  asked = dict(prompt=[1, 2, 5], echo=True, logprobs=2, max_tokens=2)

  def abort() -> None:
    running.wait_until_open(1)
    (open_,) = running.server.frontend._streams.values()
    name = open_.request.request_id
    running.stub.Abort(pb.AbortRequest(request_ids=[name]))

  aborting = threading.Thread(target=abort)
  aborting.start()
  if stream:
    events = client.events(path, {**body, **asked})
    (choice,) = [c for event in events for c in event['choices']]
  else:
    status, whole = client.json(path, {**body, **asked})
    assert status == 200, whole
    (choice,) = whole['choices']
  aborting.join()
  assert choice['finish_reason'] == 'abort'
  assert choice['text'] == 't1 t2 t5'
  assert choice['logprobs'] == {
    'tokens': ['t1', 't2', 't5'],
    'token_logprobs': [None] * 3,
    'top_logprobs': [None] * 3,
    'text_offset': [0, 2, 4],
  }


@pytest.mark.parametrize('stream', [False, True])
def test_a_prompt_that_can_not_be_read_is_told_so(
  stepped: Callable[..., Any], stream: bool
) -> None:
  _, runner, client = stepped()
  runner.open()
  fetch = runner.fetch

  def nan(pending: types.Sampled) -> types.Sampled:
    sampled = fetch(pending)
    nothing = [(math.nan,) * len(row) for row in sampled.logprobs]
    return sampled._replace(logprobs=nothing)

  runner.fetch = nan
  path, body = BODIES['text']
  asked = dict(prompt=[1, 2, 5], echo=True, logprobs=2, stream=stream)
  _, _, text = client.ask('POST', path, {**body, **asked})
  assert 'NaN or infinite' in text, text


def test_a_prompt_of_one_token(client: Client) -> None:
  told = _whole(client, 'text', prompt=[4], echo=True, logprobs=0, max_tokens=1)
  (choice,) = told['choices']
  assert choice['logprobs']['token_logprobs'] == [None, 0.0]


def test_each_of_several_prompts_is_scored(client: Client) -> None:
  told = _whole(client, 'text', prompt=[[1, 2], [9, 12]], echo=True, logprobs=1)
  assert [
    choice['logprobs']['token_logprobs'][:2] for choice in told['choices']
  ] == [[None, 0.0], [None, -2.0]]


@contextlib.contextmanager
def _limited(
  running: fake.RunningServer, name: str, most: int
) -> Iterator[None]:
  limits = running.server.frontend.limits
  before = getattr(limits, name)
  object.__setattr__(limits, name, most)
  try:
    yield
  finally:
    object.__setattr__(limits, name, before)


def test_what_is_told_of_a_long_prompt_is_bounded(
  client: Client, ours: tuple[fake.RunningServer, Client]
) -> None:
  with _limited(ours[0], 'max_prompt_logprobs', 100):
    fine, long = [1] * 50, [1] * 51
    asked = dict(prompt_logprobs=1, max_tokens=1)
    assert _whole(client, 'text', prompt=fine, **asked)
    path, body = BODIES['text']
    status, message, param = client.refused(
      path, {**body, **asked, 'prompt': long}
    )
    assert (status, param) == (400, 'prompt_logprobs')
    assert 'has 102' in message and 'max_prompt_logprobs=100' in message


def test_what_is_told_of_outputs_is_bounded(
  client: Client, ours: tuple[fake.RunningServer, Client]
) -> None:
  path, body = BODIES['chat']
  asked = {**body, 'logprobs': True, 'top_logprobs': 2, 'n': 2}
  asked |= {'temperature': 1, 'ignore_eos': True}
  with _limited(ours[0], 'max_logprobs', 24):
    assert client.json(path, {**asked, 'max_tokens': 4})[0] == 200
    status, message, param = client.refused(path, {**asked, 'max_tokens': 5})
    assert (status, param) == (400, 'logprobs')
    assert 'has 30' in message and 'max_logprobs=24' in message
    # Without max_tokens, the outputs end there.
    asked.pop('max_tokens', None)
    whole = client.json(path, asked)[1]
    assert [
      (choice['finish_reason'], len(choice['logprobs']['content']))
      for choice in whole['choices']
    ] == [('length', 4)] * 2


def test_what_one_response_tells_is_bounded_as_a_whole(
  client: Client, ours: tuple[fake.RunningServer, Client]
) -> None:
  """Of all prompts, and of their outputs; of a stream, nothing is kept."""
  path, body = BODIES['text']
  asked = {**body, 'logprobs': 1, 'max_tokens': 2, 'echo': True}
  with _limited(ours[0], 'max_logprobs', 24):
    two, three = [[1, 2, 5, 6]] * 2, [[1, 2, 5, 6]] * 3
    assert client.json(path, {**asked, 'prompt': two})[0] == 200
    status, message, param = client.refused(path, {**asked, 'prompt': three})
    assert (status, param) == (400, 'logprobs')
    assert 'has 36' in message and 'max_logprobs=24' in message
    assert client.events(path, {**asked, 'prompt': three})


_TOLD = {
  'sarathi': (sarathi_v1, '_response'),
  'vllm': (vllm_engine, '_complete'),
  'open inference': (open_inference.OpenInferenceService, '_respond'),
}


@pytest.mark.parametrize('protocol', _TOLD)
def test_grpc_tells_much_on_a_thread_of_its_own(
  ours: tuple[fake.RunningServer, Client],
  protocol: str,
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  """So that others' streams don't wait for it."""
  running, _ = ours
  owner, name = _TOLD[protocol]
  make, threads = getattr(owner, name), []

  def made(*args: Any) -> Any:
    threads.append(threading.current_thread())
    return make(*args)

  monkeypatch.setattr(owner, name, made)
  prompt, asked = [1, 2, 5] * 33, {'max_tokens': 2, 'prompt_logprobs': 1}
  if protocol == 'sarathi':
    list(running.generate(token_ids=prompt, sampling=asked))
  elif protocol == 'vllm':
    stub = vllm_engine_pb2_grpc.VllmEngineStub(running.channel)
    request = vllm_engine_pb2.GenerateRequest(
      tokenized=vllm_engine_pb2.TokenizedInput(input_ids=prompt),
      sampling_params=vllm_engine_pb2.SamplingParams(**asked),
    )
    list(stub.Generate(request, timeout=fake.TIMEOUT_S))
  else:
    infer = open_inference_pb2.ModelInferRequest(model_name='counting')
    infer.inputs.add(
      name='input_ids',
      datatype='INT64',
      shape=[len(prompt)],
      contents=open_inference_pb2.InferTensorContents(int64_contents=prompt),
    )
    infer.parameters['sampling_parameters'].string_param = json.dumps(asked)
    open_inference_pb2_grpc.GRPCInferenceServiceStub(
      running.channel
    ).ModelInfer(infer, timeout=fake.TIMEOUT_S)
  assert threads[0] is not running._thread


def test_grpc_tells_the_same(server: fake.RunningServer) -> None:
  responses = list(
    server.generate(
      token_ids=[1, 2, 5],
      sampling={
        'max_tokens': 2,
        'logprobs': 1,
        'prompt_logprobs': 0,
        'logprob_token_ids': [9],
      },
    )
  )
  told = [at for response in responses for at in response.told]
  assert told == [
    pb.TokenLogprobs(token_ids=[6, 6, 9], logprobs=[0, 0, -3], rank=1),
    pb.TokenLogprobs(token_ids=[7, 7, 9], logprobs=[0, 0, -2], rank=1),
  ]
  assert list(responses[0].prompt_logprobs) == [
    pb.TokenLogprobs(token_ids=[2], logprobs=[0], rank=1),
    pb.TokenLogprobs(token_ids=[5], logprobs=[-2], rank=3),
  ]
  assert not any(response.prompt_logprobs for response in responses[1:])


def test_nothing_is_left(ours: tuple[fake.RunningServer, Client]) -> None:
  ours[0].assert_nothing_is_left()
