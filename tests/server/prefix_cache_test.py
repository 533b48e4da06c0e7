# SPDX-License-Identifier: Apache-2.0
"""What of a prompt was in the cache is told; nobody finds what is others'."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import functools
import pathlib
from typing import Any

import pytest
from smg_grpc_proto import vllm_engine_pb2
from smg_grpc_proto import vllm_engine_pb2_grpc

from sarathi_jax import types
from sarathi_jax.server import open_inference_pb2
from sarathi_jax.server import open_inference_pb2_grpc
from sarathi_jax.server import sarathi_pb2 as pb
from sarathi_jax.server.queue import admission
from sarathi_jax.server.queue import outbox
from tests.server import fake
from tests.server import http_client

# Two full pages of four, and a part of one, of which one is computed again.
PROMPT = list(range(1, 12))


@pytest.fixture
def running(
  tokenizer_folder: pathlib.Path, tmp_path: pathlib.Path
) -> Iterator[fake.RunningServer]:
  tokens = tmp_path / 'tokens'
  tokens.write_text('ann ann-secret\nbob bob-secret\n')
  with contextlib.closing(
    fake.RunningServer(
      functools.partial(fake.make_engine, tokenizer_folder=tokenizer_folder),
      wait=True,
      http_port=0,
      auth_tokens=tokens,
    )
  ) as server:
    yield server


def test_who_finds_what(running: fake.RunningServer) -> None:
  client = http_client.Client.of(running)

  def cached(name: str, **fields: Any) -> int:
    status, whole = client.json(
      '/v1/completions',
      {'model': 'counting', 'prompt': PROMPT, 'max_tokens': 1, **fields},
      authorization=f'Bearer {name}-secret',
    )
    assert status == 200, whole
    found: int = whole['usage']['prompt_tokens_details']['cached_tokens']
    return found

  def cached_by_grpc(name: str, salt: str) -> int:
    *_, last = running.stub.Generate(
      pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=PROMPT),
        sampling=pb.SamplingParams(max_tokens=1),
        cache_salt=salt,
      ),
      metadata=[('authorization', f'Bearer {name}-secret')],
      timeout=fake.TIMEOUT_S,
    )
    found: int = last.finished.usage.cached_tokens
    return found

  assert [cached('ann'), cached('ann')] == [0, 10]
  assert [cached('bob'), cached('bob')] == [0, 10]  # By itself alone.
  assert [cached('ann', cache_salt='x')] == [0]
  assert [cached_by_grpc('ann', 'x'), cached_by_grpc('ann', '')] == [10, 10]
  assert [cached_by_grpc('bob', 'x'), cached_by_grpc('bob', '')] == [0, 10]
  # Neither a name and a salt that look like another name, nor like a salt.
  assert cached('ann', cache_salt='ann') == 0
  # The second begins as soon as two pages are there.
  assert cached('ann', prompt=[PROMPT, PROMPT], n=1, cache_salt='y') == 8
  status, refused = client.json(
    '/v1/completions',
    {'model': 'counting', 'prompt': PROMPT, 'cache_salt': 'x' * 300},
    authorization='Bearer ann-secret',
  )
  assert status == 400 and 'max_id_chars' in refused['error']['message']


def test_every_protocol_tells_what_was_found(
  tokenizer_folder: pathlib.Path,
) -> None:
  make = functools.partial(fake.make_engine, tokenizer_folder=tokenizer_folder)
  with contextlib.closing(fake.RunningServer(make, http_port=0)) as running:
    client = http_client.Client.of(running)
    inference: Any = open_inference_pb2_grpc.GRPCInferenceServiceStub(
      running.channel
    )
    infer = open_inference_pb2.ModelInferRequest(model_name='counting')
    infer.inputs.add(
      name='input_ids',
      datatype='INT64',
      shape=[len(PROMPT)],
      contents=open_inference_pb2.InferTensorContents(int64_contents=PROMPT),
    )
    infer.parameters['max_tokens'].int64_param = 3
    infer.parameters['stream'].bool_param = True

    def by_http() -> Any:
      body = {'model': 'counting', 'prompt': PROMPT, 'max_tokens': 3}
      used = client.json('/v1/completions', body)[1]['usage']
      return [
        used['prompt_tokens'],
        used['completion_tokens'],
        used['prompt_tokens_details']['cached_tokens'],
      ]

    def by_sarathi() -> Any:
      *_, last = running.generate(token_ids=PROMPT, sampling={'max_tokens': 3})
      used = last.finished.usage
      return [used.prompt_tokens, used.completion_tokens, used.cached_tokens]

    def by_vllm() -> Any:
      (response,) = vllm_engine_pb2_grpc.VllmEngineStub(
        running.channel
      ).Generate(
        vllm_engine_pb2.GenerateRequest(
          tokenized=vllm_engine_pb2.TokenizedInput(input_ids=PROMPT),
          sampling_params=vllm_engine_pb2.SamplingParams(max_tokens=3),
        ),
        timeout=fake.TIMEOUT_S,
      )
      used = response.complete
      return [used.prompt_tokens, used.completion_tokens, used.cached_tokens]

    def by_open_inference() -> Any:
      *first, last = (
        dict(
          zip(
            [output.name for output in r.infer_response.outputs],
            r.infer_response.raw_output_contents,
            strict=True,
          )
        )
        for r in inference.ModelStreamInfer(
          iter([infer]), timeout=fake.TIMEOUT_S
        )
      )
      names = 'prompt_tokens', 'completion_tokens', 'cached_tokens'
      assert not any(name in outputs for outputs in first for name in names)
      return [int.from_bytes(last[name], 'little') for name in names]

    assert by_http() == [11, 3, 0]
    for told in (by_http, by_sarathi, by_vllm, by_open_inference):
      assert told() == [11, 3, 10], told


def test_found_tokens_take_no_room_of_a_step() -> None:
  """Or requests that are all there would begin one by one."""
  engine = fake.make_engine(token_budget=8)
  queue = admission.Queue(admission.Limits())

  def push(*names: str) -> None:
    for name in names:
      request = types.Request(
        request_id=name,
        prompt_token_ids=(1,) * 38,
        sampling=types.SamplingParams(max_tokens=1),
      )
      queue.push(outbox.Stream(request, lambda stream: None))

  def begin() -> list[str]:
    begun = [stream.request for stream, _ in queue.begin(engine)]
    for request in begun:
      engine.add(request)
    return [request.request_id for request in begun]

  push('a', 'b', 'c', 'd')
  assert begin() == ['a']
  while engine.has_work:
    engine.step()
  assert begin() == ['b', 'c', 'd']  # Of each two tokens are missing.
  assert begin() == []


def test_of_a_clients_requests_the_first_are_those_that_find_the_most() -> None:
  """A few of these; and no other client's turn is taken."""
  engine = fake.make_engine(
    token_budget=8, max_num_seqs=1, cache_aware_window=3
  )
  queue = admission.Queue(admission.Limits())

  def push(name: str, prompt: tuple[int, ...], client: str = 'ann') -> None:
    request = types.Request(
      request_id=name,
      prompt_token_ids=prompt,
      sampling=types.SamplingParams(max_tokens=1),
      client=client,
    )
    queue.push(outbox.Stream(request, lambda stream: None))

  def served() -> list[str]:
    """All that waits, one at a time, as each fills the only slot."""
    names = []
    while len(queue):
      for stream, _ in queue.begin(engine):
        names.append(stream.request.request_id)
        engine.add(stream.request)
      while engine.has_work:
        engine.step()
    return names

  known = (1,) * 38
  push('first', known)
  assert served() == ['first']
  push('cold', (2,) * 38)
  for i in range(4):
    push(f'hot{i}', known)
  push('other', (3,) * 39, 'bob')
  names = served()
  # Two of the window of three pass the first; then it is its turn.
  assert [n for n in names if n != 'other'] == [
    'hot0',
    'hot1',
    'cold',
    'hot2',
    'hot3',
  ]
  # The clients take turns, whatever is found.
  assert names.index('other') <= 2
