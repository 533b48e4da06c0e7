# SPDX-License-Identifier: Apache-2.0
"""OpenAI's HTTP, our own: refused, given up, drained, left by its client."""

from __future__ import annotations

import contextlib
import json
import pathlib
import signal
import socket
import threading
import time
from typing import Any

import pytest

from sarathi_jax.server.guard import limits as limits_lib
from tests.server import fake
from tests.server import http_client
from tests.server import process_test
from tests.server.http_client import PROMPT
from tests.server.http_client import Client


@pytest.mark.parametrize('stream', [False, True])
@pytest.mark.parametrize('num_prompts', [1, 3])
def test_overload_says_when_to_come_again(
  stepped: Any, stream: bool, num_prompts: int
) -> None:
  running, runner, client = stepped(
    max_num_seqs=1,
    config={'limits': limits_lib.Limits(max_waiting=1)},
  )
  calls = [client.begin('/v1/completions', PROMPT)]
  runner.let(1)
  fake.wait_until(
    lambda: len(running.server.frontend.engine_thread._streams) == 1
  )
  calls.append(client.begin('/v1/completions', PROMPT))
  fake.wait_until(lambda: running.server.frontend.engine_thread.num_queued == 1)
  body = {**PROMPT, 'prompt': ['t1'] * num_prompts, 'stream': stream}
  status, headers, text = client.ask('POST', '/v1/completions', body)
  told = json.loads(text)['error']
  assert status == 429 and 'max_waiting=1' in told['message']
  assert told['code'] == 'rate_limit_exceeded'
  assert int(headers['retry-after']) >= 1
  assert int(headers['retry-after-ms']) >= 1
  runner.open()
  assert [call.getresponse().status for call in calls] == [200, 200]
  running.assert_nothing_is_left()


def test_what_is_refused_is_refused_as_a_whole(stepped: Any) -> None:
  running, runner, client = stepped()
  runner.open()
  body = {**PROMPT, 'prompt': ['t1', [64]], 'stream': True}
  status, message, _ = client.refused('/v1/completions', body)
  assert status == 400 and '64' in message
  running.assert_nothing_is_left()


@pytest.mark.parametrize('stream', [False, True])
def test_a_failed_step(stepped: Any, stream: bool) -> None:
  running, runner, client = stepped()
  runner.fault = RuntimeError('/secret of a step')
  runner.open()
  status, message, _ = client.refused(
    '/v1/completions', {**PROMPT, 'stream': stream}
  )
  assert status == 500 and 'RuntimeError' in message
  assert 'secret' not in message
  running.assert_nothing_is_left()


def test_a_dead_engine_ends_streams_with_an_error(stepped: Any) -> None:
  _, runner, client = stepped()
  with contextlib.closing(
    client.begin('/v1/completions', {**PROMPT, 'stream': True})
  ) as connection:
    runner.let(1)
    reply = connection.getresponse()
    assert json.loads(reply.readline()[6:])['choices'][0]['text'] == ' t3'
    runner.fault, runner.is_gone = RuntimeError('a step failed'), True
    runner.open()
    told = json.loads(reply.read().strip().removeprefix(b'data: '))['error']
    assert (
      told['type'] == 'server_error' and 'engine stopped' in (told['message'])
    )
  status, message, _ = client.refused('/v1/completions', PROMPT)
  assert status == 503 and 'engine stopped' in message
  fake.wait_until(lambda: client.ask('GET', '/health')[0] == 503)


def test_logits_that_are_not_finite(stepped: Any) -> None:
  _, runner, client = stepped()
  sampled = runner.fetch
  runner.open()
  runner.fetch = lambda pending: sampled(pending)._replace(
    logprobs=[
      (float('nan') if token == 5 else -1.0,) for (token,) in pending.tokens
    ]
  )
  status, message, _ = client.refused('/v1/completions', PROMPT)
  assert status == 500 and 'NaN' in message
  *events, last = client.events('/v1/completions', PROMPT)
  assert ''.join(e['choices'][0]['text'] for e in events) == ' t3 t4'
  assert 'NaN' in last['error']['message']


def test_it_drains(stepped: Any) -> None:
  running, runner, client = stepped(max_num_seqs=1)
  bodies = {**PROMPT, 'stream': True}, PROMPT
  calls = []
  for i, body in enumerate(bodies):
    calls.append(client.begin('/v1/completions', body))
    running.wait_until_open(i + 1)
    runner.let(1)
    fake.wait_until(
      lambda i=i: running.server.frontend.engine_thread.num_queued == i
    )
  draining = running.submit(running.server.drain())
  # What waits in vain is refused, what is new as well; the rest goes on.
  reply = calls[1].getresponse()
  assert reply.status == 503
  assert client.refused('/v1/completions', PROMPT)[0] == 503
  assert client.ask('GET', '/health')[0] == 503
  runner.open()
  assert b'[DONE]' in calls[0].getresponse().read()
  draining.result(fake.TIMEOUT_S)


def test_while_it_loads() -> None:
  gate = threading.Event()

  def make() -> Any:
    gate.wait()
    return fake.make_engine()

  with contextlib.closing(
    fake.RunningServer(make, wait=False, http_port=0)
  ) as running:
    client = Client.of(running)
    for method, path in (
      ('GET', '/health'),
      ('GET', '/v1/models'),
      ('POST', '/v1/completions'),
      ('POST', '/tokenize'),
    ):
      status, _, text = client.ask(method, path, {})
      assert status == 503 and 'loaded' in text, path
    gate.set()
    running.warming.result(fake.TIMEOUT_S)
    assert client.ask('GET', '/health')[0] == 200


@pytest.mark.parametrize('stream', [False, True])
@pytest.mark.parametrize('prompt', ['t1', ['t1', 't2']])
@pytest.mark.parametrize('begun', [False, True])
def test_a_client_that_leaves_cancels_its_request(
  stepped: Any, stream: bool, prompt: Any, begun: bool
) -> None:
  running, runner, client = stepped()
  body = {**PROMPT, 'prompt': prompt, 'stream': stream, 'max_tokens': 100}
  connection = client.begin('/v1/completions', body)
  running.wait_until_open(len(prompt) if isinstance(prompt, list) else 1)
  if begun:
    runner.let(3)
    time.sleep(0.05)
  connection.close()
  fake.wait_until(lambda: not running.server.frontend.num_open)
  runner.open()
  running.assert_nothing_is_left()
  assert client.serves()


def test_of_several_requests_at_once_all_end_with_their_client(
  stepped: Any,
) -> None:
  """HTTP's pipelining, of which uvicorn tells the last one alone."""
  running, runner, client = stepped()
  data = json.dumps({**PROMPT, 'max_tokens': 100}).encode()
  request = (
    b'POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n'
    % len(data)
  ) + data
  with socket.create_connection(('127.0.0.1', client.port)) as connection:
    connection.sendall(2 * request)
    running.wait_until_open(1)
    runner.let(2)
  fake.wait_until(lambda: not running.server.frontend.num_open)
  runner.open()
  running.assert_nothing_is_left()


def test_what_does_not_end_in_time_is_cut_off(stepped: Any) -> None:
  running, runner, client = stepped()
  connection = client.begin('/v1/completions', {**PROMPT, 'stream': True})
  runner.let(1)
  reply = connection.getresponse()
  assert b't3' in reply.readline()

  async def cut_off() -> None:
    running.server.frontend.cut_off()

  running.run(cut_off())
  told = json.loads(reply.read().strip().removeprefix(b'data: '))['error']
  assert 'shutting down' in told['message']


def test_a_process_that_is_told_to_end_lets_streams_end(
  chat_folder: pathlib.Path,
) -> None:
  port = fake.free_port()
  process = process_test.Process(
    'tests/server/fake.py', '0', '60', str(chat_folder), f'http_port={port}'
  )
  try:
    process.read_until(r'Serving \S+ at')
    body = {'prompt': 't1', 'stream': True, 'max_tokens': 120}
    with contextlib.closing(
      http_client.Client(port).begin('/v1/completions', body)
    ) as connection:
      reply = connection.getresponse()
      process.process.send_signal(signal.SIGTERM)
      assert reply.read().endswith(b'data: [DONE]\n\n')
    code, err = process.end()
    assert (code, 'Traceback' in err) == (0, False)
  finally:
    process.close()
