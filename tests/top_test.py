# SPDX-License-Identifier: Apache-2.0
"""What the terminal view shows of a server, and who may see requests."""

from __future__ import annotations

import contextlib
import functools
import io
import pathlib
import subprocess
import sys

import rich.console

from sarathi_jax import top
from sarathi_jax.server import sarathi_pb2 as pb
from sarathi_jax.server import sarathi_pb2_grpc
from tests.server import fake

ROOT = pathlib.Path(__file__).parents[1]


def _draw(now: top.Look, before: top.Look | None = None) -> str:
  console = rich.console.Console(file=io.StringIO(), width=100)
  console.print(top.render(now, before))
  return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_shows_what_runs() -> None:
  with contextlib.closing(fake.RunningServer(functools.partial(
      fake.make_engine, max_model_len=2**14, num_pages=2**13))) as running:
    call = running.generate(
      token_ids=[1] * 5, request_id='mine', sampling={'max_tokens': 9000})
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


def test_requests_are_for_administrators(tmp_path: pathlib.Path) -> None:
  tokens = tmp_path / 'tokens'
  tokens.write_text('ann user\nops root admin\n')
  with contextlib.closing(fake.RunningServer(
      fake.make_engine, auth_tokens=tokens)) as running:
    assert top.look(running.channel, 'user').requests is None
    assert top.look(running.channel, 'root').requests == ()


def test_as_a_command() -> None:
  with contextlib.closing(fake.RunningServer(fake.make_engine)) as running:
    done = subprocess.run(
      [sys.executable, '-m', 'sarathi_jax.top', '--count=2',
       '--interval_s=0.1', f'--target=127.0.0.1:{running.server.port}'],
      cwd=ROOT, capture_output=True, text=True, check=True)
  assert 'counting' in done.stdout and done.stderr == ''
  failed = subprocess.run(
    [sys.executable, '-m', 'sarathi_jax.top', '--target=127.0.0.1:1'],
    cwd=ROOT, capture_output=True, text=True, check=False)
  assert failed.returncode == 1 and failed.stderr.startswith('error: ')
