# SPDX-License-Identifier: Apache-2.0
"""The command-line client, as a process against a server in this one."""

from __future__ import annotations

from collections.abc import Callable
import json
import pathlib
import signal
import socket
import subprocess
import sys
from typing import Any

import pytest

from tests.server import fake

ROOT = pathlib.Path(__file__).parents[2]


def _start(target: int, *args: str) -> subprocess.Popen[str]:
  return subprocess.Popen(
    [
      sys.executable,
      '-m',
      'sarathi_jax.client',
      f'--target=localhost:{target}',
      *args,
    ],
    cwd=ROOT,
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )


def _run(target: int, *args: str) -> tuple[int, str, str]:
  client = _start(target, *args)
  out, err = client.communicate(timeout=fake.TIMEOUT_S)
  return client.returncode, out, err


def test_text_on_stdout_summary_on_stderr(server: fake.RunningServer) -> None:
  code, out, err = _run(server.server.port, 't1 t2', '--max_tokens=3')
  assert (code, out.split()) == (0, ['t3', 't4', 't5'])
  assert err.startswith('2 prompt tokens, 3 generated, length, ttft ')
  assert 'tpot' in err


def test_several_outputs_are_printed_one_after_the_other(
  server: fake.RunningServer,
) -> None:
  code, out, err = _run(
    server.server.port, 't1 t2', '--max_tokens=3', '--n=2', '--temperature=1'
  )
  assert code == 0
  assert [line.split() for line in out.splitlines()] == [
    ['[0]', 't3', 't4', 't5'],
    ['[1]', 't3', 't4', 't5'],
  ]
  assert err.count('2 prompt tokens, 3 generated, length') == 2


def test_sampling_flags_are_sent(server: fake.RunningServer) -> None:
  code, out, err = _run(
    server.server.port,
    't1',
    '--max_tokens=40',
    '--stop=t9',
    '--stop=t4',
    '--temperature=0',
    '--seed=0',
    '--include_stop_str_in_output',
  )
  assert (code, out.split()) == (0, ['t2', 't3', 't4'])
  assert ', stop,' in err


def test_token_ids_and_json(server: fake.RunningServer) -> None:
  code, out, _ = _run(
    server.server.port,
    '--token_ids=1,2',
    '--max_tokens=3',
    '--json',
    '--request_id=mine',
  )
  lines = [json.loads(line) for line in out.splitlines()]
  assert code == 0
  assert [t for line in lines for t in line['token_ids']] == [3, 4, 5]
  assert lines[0]['request_id'] == 'mine'
  usage = lines[-1]['finished']['usage']
  assert (usage['prompt_tokens'], usage['completion_tokens']) == (2, 3)


def test_token_ids_are_printed_for_token_ids(
  server: fake.RunningServer,
) -> None:
  assert _run(server.server.port, '--token_ids=1,2', '--max_tokens=3')[:2] == (
    0,
    '3 4 5 \n',
  )


@pytest.mark.parametrize(
  'args, says',
  [
    (('t1', '--max_tokens=0'), 'error: INVALID_ARGUMENT: max_tokens=0'),
    (('t1', '--logprobs=33'), 'error: INVALID_ARGUMENT: logprobs=33'),
    ((), 'error: give one prompt'),
    (('two', 'prompts'), 'error: give one prompt'),
    (('--token_ids=1,x',), "error: --token_ids: 'x' is not a token id"),
  ],
)
def test_errors_are_one_line_without_a_traceback(
  server: fake.RunningServer, args: tuple[str, ...], says: str
) -> None:
  code, out, err = _run(server.server.port, *args)
  assert code == 1
  assert err.startswith(says) and err.count('\n') == 1
  assert out == ''


def test_an_end_by_an_error_is_a_failure(gated: Callable[..., Any]) -> None:
  running, runner = gated()
  sampled = runner.fetch
  runner.open()
  runner.fetch = lambda pending: sampled(pending)._replace(
    logprobs=[(float('nan'),)] * len(pending.tokens)
  )
  code, out, err = _run(running.server.port, '--token_ids=1')
  assert (code, out.split()) == (1, [])
  assert err.startswith('1 prompt tokens, 0 generated, error')


def test_no_server() -> None:
  with socket.socket() as unused:
    unused.bind(('127.0.0.1', 0))
    code, _, err = _run(unused.getsockname()[1], 't1')
  assert code == 1
  assert err.startswith('error: no server at localhost:')
  assert 'Traceback' not in err


def test_ctrl_c_cancels_the_request(gated: Callable[..., Any]) -> None:
  running, runner = gated()
  client = _start(running.server.port, '--token_ids=1', '--max_tokens=100')
  runner.let(1)
  assert client.stdout.read(1) == '2'
  client.send_signal(signal.SIGINT)
  _, err = client.communicate(timeout=fake.TIMEOUT_S)
  assert client.returncode == 130
  assert err.strip() == 'cancelled'
  running.wait_until_open(0)
  runner.open()
  fake.wait_until(running.all_pages_are_free)
  assert running.engine.metrics.num_aborted == 1


def test_a_timeout_is_told(gated: Callable[..., Any]) -> None:
  running, _ = gated()
  code, _, err = _run(running.server.port, '--token_ids=1', '--timeout_s=0.3')
  assert code == 1
  assert err == 'error: no end within --timeout_s=0.3\n'
