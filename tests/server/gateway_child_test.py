# SPDX-License-Identifier: Apache-2.0
"""A gateway that does its worst: the server goes on, and starts another one.

The children here are no smg, but answer its probe, and then misbehave.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
import contextlib
import os
import signal
import socket
import sys
import time
from typing import Any

import psutil
import pytest

from sarathi_jax import errors
from sarathi_jax.server import background
from sarathi_jax.server import gateway
from tests.server import fake
from tests.server import process_test

_CHILD = """\
import http.server, json, os, signal, subprocess, sys, threading, time
told = json.loads(sys.stdin.readline())
args = told['args']
port = int(args[args.index('--port') + 1])
class Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = 'HTTP/1.1'
  def do_GET(self):
    self.send_response(200)
    self.send_header('content-length', '2')
    self.end_headers()
    self.wfile.write(b'ok')
  def do_POST(self):
    self.rfile.read(int(self.headers['content-length']))
    self.do_GET()
  def log_message(self, *args):
    pass
http.server.ThreadingHTTPServer.allow_reuse_address = True
server = http.server.ThreadingHTTPServer(('127.0.0.1', port), Handler)
out = os.fdopen(1, 'wb', 0)
def loop(work):
  threading.Thread(target=work, daemon=True).start()
{misdeed}
server.serve_forever()
"""
# What it does while it serves.
MISDEEDS = {
  'a long line': 'out.write(b"x" * 10_000_000 + b"\\n")',
  'a long line without an end': 'out.write(b"x" * 10_000_000)',
  'no text': 'out.write(bytes(range(256)) * 1000)',
  'control sequences': 'out.write(b"\\x1b]0;title\\x07\\x1b[2J\\r\\x00" * 99)',
  'a closed pipe': 'out.close(); os.close(2)',
  'a closed pipe to hear by': 'sys.stdin.close()',
  'a flood': """
def flood():
  while True:
    out.write(b"y" * 65536)
loop(flood)""",
  'a child that keeps its pipe': (
    'subprocess.Popen([sys.executable, "-c", "import time; time.sleep(9)"])'
  ),
  'deafness': 'signal.signal(signal.SIGTERM, signal.SIG_IGN)',
}
# What ends it, or makes it useless.
ENDS = {
  'it ends': 'loop(lambda: (time.sleep(0.3), os._exit(3)))',
  'it is killed': (
    'loop(lambda: (time.sleep(0.3), os.kill(os.getpid(), signal.SIGKILL)))'
  ),
  'it stops': (
    'loop(lambda: (time.sleep(0.3), os.kill(os.getpid(), signal.SIGSTOP)))'
  ),
  'it answers nonsense': """
def nonsense():
  time.sleep(0.3)
  Handler.do_GET = lambda self: self.wfile.write(b"\\0" * 1_000_000)
loop(nonsense)""",
  'it answers no more': (
    'loop(lambda: (time.sleep(0.3), setattr(Handler, "do_GET", '
    'lambda self: time.sleep(99))))'
  ),
}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
  for name, value in (('_PROBE_S', 0.05), ('_ANSWER_S', 1.0), ('_STOP_S', 0.5)):
    monkeypatch.setattr(gateway, name, value)
  monkeypatch.setattr(background, '_LOOK_S', 0.02)
  monkeypatch.setattr(background, '_PAUSE_S', 0.02)


async def _until(condition: Callable[[], bool]) -> None:
  async with asyncio.timeout(fake.TIMEOUT_S):
    while not condition():
      await asyncio.sleep(0.01)


async def _serve(
  watch: background.Watch, changes: list[bool]
) -> gateway.Gateway:
  made = gateway.Gateway(
    '127.0.0.1', fake.free_port(), ['127.0.0.1:1'], on_change=changes.append
  )
  assert await made.start(10)
  watch.add(made.as_background)
  watch.start()
  return made


def _run(
  misdeed: str,
  monkeypatch: pytest.MonkeyPatch,
  work: Callable[[gateway.Gateway, background.Watch, list[bool]], object],
) -> list[float]:
  """Runs `work` beside such a gateway; returns the event loop's gaps."""
  monkeypatch.setattr(
    gateway, '_CHILD', ('-c', _CHILD.replace('{misdeed}', misdeed))
  )
  gaps: list[float] = []

  async def tick() -> None:
    while True:
      start = time.monotonic()
      await asyncio.sleep(0.01)
      gaps.append(time.monotonic() - start)

  async def run() -> None:
    faults: list[errors.EngineDeadError] = []
    watch = background.Watch(faults.append)
    changes: list[bool] = []
    made = await _serve(watch, changes)
    ticking = asyncio.create_task(tick())
    try:
      await work(made, watch, changes)  # type: ignore[misc]
    finally:
      ticking.cancel()
      pid = made.pid
      await watch.stop()
      await made.stop()
    assert not faults and made.pid is None
    if pid is not None:
      with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)

  asyncio.run(run())
  return gaps


@pytest.mark.parametrize('misdeed', MISDEEDS)
def test_what_it_says_disturbs_nobody(
  monkeypatch: pytest.MonkeyPatch, misdeed: str
) -> None:
  async def work(
    made: gateway.Gateway, watch: background.Watch, changes: list[bool]
  ) -> None:
    pid = made.pid
    await asyncio.sleep(0.3)
    assert made.is_serving and made.pid == pid  # and goes on serving
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    await _until(lambda: made.pid not in (None, pid) and made.is_serving)
    assert watch.num_restarts == {'gateway': 1}
    assert changes == [True, False, True]

  gaps = _run(MISDEEDS[misdeed], monkeypatch, work)
  assert sorted(gaps)[len(gaps) // 2] < 0.05


@pytest.mark.parametrize('end', ENDS)
def test_what_is_of_no_use_is_replaced(
  monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
  # A good one that is too slow is replaced, too: that does no harm here.
  monkeypatch.setattr(gateway, '_ANSWER_S', 0.3)

  async def work(
    made: gateway.Gateway, watch: background.Watch, changes: list[bool]
  ) -> None:
    pids = {made.pid}
    await _until(
      lambda: (
        pids.add(made.pid)
        or (  # type: ignore[func-returns-value]
          watch.num_restarts['gateway'] >= 2 and made.is_serving
        )
      )
    )
    assert len(pids - {None}) >= 2
    assert changes[:4] == [True, False, True, False]

  _run(ENDS[end], monkeypatch, work)


@pytest.mark.parametrize('num_refusals', [0, 3, 10**9])
def test_it_serves_once_it_has_the_tokenizer(
  monkeypatch: pytest.MonkeyPatch, num_refusals: int
) -> None:
  has_no_tokenizer = f"""
asked = []
def do_POST(self):
  self.rfile.read(int(self.headers['content-length']))
  asked.append(self.path)
  self.send_response(503 if len(asked) <= {num_refusals} else 200)
  self.send_header('content-length', '0')
  self.end_headers()
Handler.do_POST = do_POST"""
  child = _CHILD.replace('{misdeed}', has_no_tokenizer)
  monkeypatch.setattr(gateway, '_CHILD', ('-c', child))
  monkeypatch.setattr(gateway, '_READY_S', 2.0)

  async def run() -> bool:
    made = gateway.Gateway('127.0.0.1', fake.free_port(), ['127.0.0.1:1'])
    try:
      return await made.start(10)
    finally:
      await made.stop()

  assert asyncio.run(run()) == (num_refusals < 10**9)


def test_the_log_says_what_it_said_and_moves_no_cursor(
  monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
  async def work(
    made: gateway.Gateway, watch: background.Watch, changes: list[bool]
  ) -> None:
    await _until(lambda: watch.num_restarts['gateway'] > 0)

  _run(
    'out.write(b"\\x1b[31mred\\x1b]0;t\\x07" + b"z" * 9999 + b"\\nlast")\n'
    'loop(lambda: (time.sleep(0.3), os._exit(7)))',
    monkeypatch,
    work,
  )
  line = next(r.getMessage() for r in caplog.records)
  assert 'gateway ended: with 7' in line and 'last' in line
  assert len(line) < 1000 and line.isprintable()


@pytest.mark.parametrize(
  'args, says',
  [(['--no-such-flag'], '--no-such-flag'), (['--policy', 'x'], 'policy')],
)
def test_wrong_arguments_are_an_error_at_once(
  args: list[str], says: str
) -> None:
  async def run() -> None:
    await gateway.Gateway(
      '127.0.0.1', fake.free_port(), ['127.0.0.1:1'], args
    ).start(10)

  with pytest.raises(errors.ConfigError, match=says):
    asyncio.run(run())


@pytest.mark.parametrize('arg', ['--port', '--port=1', '--host=x'])
def test_what_is_ours_to_say_is_refused(arg: str) -> None:
  with pytest.raises(errors.ConfigError, match=arg.partition('=')[0]):
    gateway.Gateway('127.0.0.1', fake.free_port(), [], [arg])


def test_its_metrics_have_a_port_of_their_own(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  port = fake.free_port()
  listen = socket.create_server

  def unlucky(address: tuple[str, int], **kwargs: Any) -> socket.socket:
    if not address[1]:  # Any that is free is wanted; it may be this one.
      with contextlib.suppress(OSError):
        return listen((address[0], port), **kwargs)
    return listen(address, **kwargs)

  monkeypatch.setattr(socket, 'create_server', unlucky)
  made = gateway.Gateway('127.0.0.1', port, [])
  # smg refuses one port for both.
  assert made._args[made._args.index('--prometheus-port') + 1] != str(port)


@pytest.mark.skipif(sys.platform != 'linux', reason='has no PDEATHSIG')
def test_it_does_not_outlive_a_server_that_is_killed() -> None:
  code = (
    'import asyncio\nfrom sarathi_jax.server import gateway\n'
    'async def run():\n'
    f'  made = gateway.Gateway("127.0.0.1", {fake.free_port()}, [])\n'
    '  made.restart()\n'
    '  while made.pid is None: await asyncio.sleep(0.01)\n'
    '  print("child", made.pid, flush=True)\n'
    '  await asyncio.sleep(99)\nasyncio.run(run())'
  )
  process = process_test.Process('-c', code)
  child = psutil.Process(int(process.read_until(r'child (\d+)')[1]))
  fake.wait_until(lambda: 'smg' in ' '.join(child.cmdline()))
  child.send_signal(signal.SIGSTOP)
  process.close()
  child.wait(fake.TIMEOUT_S)
