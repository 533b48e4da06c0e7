# SPDX-License-Identifier: Apache-2.0
"""What the terminal view shows of a server, and who may see requests."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import pathlib
import subprocess
import sys

import rich.console

from sarathi_jax import top
from sarathi_jax.engine import fake_runner
from sarathi_jax.server import sarathi_pb2 as pb
from sarathi_jax.server import sarathi_pb2_grpc
from tests.server import fake

ROOT = pathlib.Path(__file__).parents[1]


def _draw(
  now: top.Look, before: top.Look | None = None, width: int = 100
) -> str:
  console = rich.console.Console(file=io.StringIO(), width=width)
  console.print(top.render(now, before, width))
  return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_shows_what_runs() -> None:
  runner = functools.partial(fake_runner.FakeRunner, step_s=1e-3)
  with contextlib.closing(
    fake.RunningServer(
      functools.partial(
        fake.make_engine, runner, max_model_len=2**12, num_pages=2**11
      )
    )
  ) as running:
    call = running.generate(
      token_ids=[1] * 5, request_id='mine', sampling={'max_tokens': 1000}
    )
    assert next(call).token_ids[0] == 2
    sarathi_pb2_grpc.ControlStub(running.channel).Pause(pb.PauseRequest())
    before = top.look(running.channel, None)
    text = _draw(before)
    assert 'counting · sarathi' in text and 'paused' in text
    assert 'mine' in text and 'decode' in text
    assert '1 of 4, 0 waiting' in text
    sarathi_pb2_grpc.ControlStub(running.channel).Resume(pb.ResumeRequest())
    fake.take(call)
    now = top.look(running.channel, None)
    text = _draw(now, before)
    assert 'mine' not in text and '0 of 4' in text and '/s' in text
    gained = now.stats.num_generated - before.stats.num_generated
    assert f'{gained / (now.time - before.time):,.0f}/s' in text


def test_fits_into_fifty_columns() -> None:
  """Nothing is broken over two lines, or cut, with large numbers in it."""
  stats = pb.GetStatsResponse(
    num_running=128,
    num_waiting=4321,
    num_pages=40_000,
    num_free_pages=1,
    token_budget=2048,
    last_step_tokens=2048,
    uptime_s=123456,
    decode_stall_s=1234.5,
    padding_waste=0.123,
    num_preemptions=12345,
    ttft_p50_s=12.3456,
    ttft_p99_s=23.4567,
    tbt_p50_s=0.0999,
    tbt_p99_s=1.2345,
  )
  request = pb.RequestState(
    request_id='chatcmpl-0123456789abcdef',
    client='ipv4:127.0.0.1:12345',
    is_running=True,
    num_prompt_tokens=131_072,
    num_output_tokens=16_384,
    max_output_tokens=20_000,
    age_s=1234.5,
  )
  look = top.Look(
    9.0,
    pb.GetModelInfoResponse(
      model_name='llama', policy='sarathi', max_num_seqs=128, page_size=64
    ),
    stats,
    (request,),
  )
  before = dataclasses.replace(look, time=1.0, stats=pb.GetStatsResponse())
  text = _draw(look, before, 50)
  lines = text.splitlines()
  assert max(map(len, lines)) <= 50 and '…' not in text
  for line in (
    '2048 of 2048 in the last step',
    '2,559,936 of 2,560,000 tokens',
    '128 of 128, 4321 waiting',
    'P50 12345.6 ms  P99 23456.7 ms',
    'P50 99.9 ms  P99 1234.5 ms',
    '1234.500 s',
    '12,345',
    '0123456789abcdef  decode  16,384  1234.5 s',
  ):
    assert any(line in found for found in lines), (line, text)
  wide = _draw(look, before, 100)
  assert '127.0.0.1' in wide and '━' in wide and '━' not in text


def test_requests_are_for_administrators(tmp_path: pathlib.Path) -> None:
  tokens = tmp_path / 'tokens'
  tokens.write_text('ann user\nops root admin\n')
  with contextlib.closing(
    fake.RunningServer(fake.make_engine, auth_tokens=tokens)
  ) as running:
    assert top.look(running.channel, 'user').requests is None
    assert top.look(running.channel, 'root').requests == ()


def test_as_a_command() -> None:
  with contextlib.closing(fake.RunningServer(fake.make_engine)) as running:
    done = subprocess.run(
      [
        sys.executable,
        '-m',
        'sarathi_jax.top',
        '--count=2',
        '--interval_s=0.1',
        f'--target=127.0.0.1:{running.server.port}',
      ],
      cwd=ROOT,
      capture_output=True,
      text=True,
      check=True,
    )
  assert 'counting' in done.stdout and done.stderr == ''
  failed = subprocess.run(
    [sys.executable, '-m', 'sarathi_jax.top', '--target=127.0.0.1:1'],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert failed.returncode == 1 and failed.stderr.startswith('error: ')
