# SPDX-License-Identifier: Apache-2.0
"""Each part that runs in the background is ended: it comes back, or all ends.

`PARTS` has one way to end each of them; a part that has none fails a test.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent import futures
import contextlib
import ctypes
import functools
import itertools
import os
import pathlib
import re
import signal
import threading
import time
from typing import Any
import urllib.request

import grpc
from grpc_health.v1 import health_pb2
from grpc_health.v1 import health_pb2_grpc
import pytest

from sarathi_jax import errors
from sarathi_jax.server import background
from sarathi_jax.server import sarathi_pb2 as pb
from sarathi_jax.server.protocols import health
from tests.server import fake
from tests.server import process_test


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(background, '_LOOK_S', 0.02)
  monkeypatch.setattr(background, '_PAUSE_S', 0.02)


@pytest.fixture
def everything(
  quick: None, tokenizer_folder: pathlib.Path, tmp_path: pathlib.Path
) -> Iterator[fake.RunningServer]:
  """A server that has all of them."""
  collector = grpc.server(futures.ThreadPoolExecutor(1))  # refuses all spans
  port = collector.add_insecure_port('127.0.0.1:0')
  collector.start()
  with contextlib.closing(
    fake.RunningServer(
      functools.partial(fake.make_engine, tokenizer_folder=tokenizer_folder),
      gateway_port=fake.free_port(),
      http_port=0,
      metrics_port=0,
      trace_dir=tmp_path,
      otlp_endpoint=f'http://127.0.0.1:{port}',
    )
  ) as running:
    yield running
  collector.stop(None)


def _end_thread(name: str) -> None:
  """Raises SystemExit in a thread, as soon as it runs Python."""
  *_, thread = (t for t in threading.enumerate() if name in t.name)
  assert thread.ident is not None
  ctypes.pythonapi.PyThreadState_SetAsyncExc(
    ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit)
  )


def _cancel(running: fake.RunningServer, name: str) -> None:
  async def cancel() -> None:
    (task,) = (t for t in asyncio.all_tasks() if name in repr(t))
    task.cancel()

  running.run(cancel())


def _scrape(running: fake.RunningServer) -> str:
  with urllib.request.urlopen(
    f'http://127.0.0.1:{running.server.telemetry.metrics_port}/metrics',
    timeout=fake.TIMEOUT_S,
  ) as reply:
    text: str = reply.read().decode()
    return text


def _end_metrics(running: fake.RunningServer) -> None:
  _end_thread('metrics')
  with contextlib.suppress(OSError):  # it may be the last that is answered
    _scrape(running)


def _end_trace(running: fake.RunningServer) -> None:
  _end_thread('trace')
  running.is_alive()  # so that it has something to write


def _kill_gateway(running: fake.RunningServer) -> None:
  gateway = running.server._gateway
  assert gateway is not None and gateway.pid is not None
  os.kill(gateway.pid, signal.SIGKILL)


# Name -> the ways to end it.
PARTS: dict[str, tuple[Callable[[fake.RunningServer], None], ...]] = {
  'gateway': (_kill_gateway, lambda running: _cancel(running, "'gateway'")),
  'http': (lambda running: _cancel(running, "'http'"),),
  'metrics': (_end_metrics,),
  'trace': (_end_trace,),
  'spans': (lambda running: _end_thread('OtelBatch'),),
}
FATAL: dict[str, Callable[[fake.RunningServer], None]] = {
  'engine': lambda running: (
    _end_thread('engine'),
    running.submit(running.server.frontend.stats()),
  )[0],
  'grpc': lambda running: _cancel(running, '_server_main_loop'),
  'watch': lambda running: _cancel(running, "'watch'"),
}


def test_each_part_is_ended_by_a_test(everything: fake.RunningServer) -> None:
  assert set(everything.server.watch.is_up()) | {'watch'} == ({*PARTS, *FATAL})


@pytest.mark.filterwarnings(
  'ignore::pytest.PytestUnhandledThreadExceptionWarning'
)
def test_what_can_be_started_again_is(everything: fake.RunningServer) -> None:
  watch = everything.server.watch
  fake.wait_until(lambda: all(watch.is_up().values()))
  for name, ways in PARTS.items():
    for num_before, end in enumerate(ways):
      end(everything)
      fake.wait_until(
        lambda n=name, k=num_before: (
          watch.num_restarts[n] > k and watch.is_up()[n]
        )
      )
      assert everything.is_alive()
  assert everything.server.fault is None
  text = _scrape(everything)
  for name, ways in PARTS.items():
    assert f'sarathi:background_up{{name="{name}"}} 1.0' in text
    (count,) = re.findall(
      rf'sarathi:background_restarts_total{{name="{name}"}} (\S+)', text
    )
    assert float(count) >= len(ways)


@pytest.mark.filterwarnings(  # by grpc.aio, which can't be stopped in order
  'ignore::pytest.PytestUnraisableExceptionWarning'
)
@pytest.mark.parametrize('name', FATAL)
def test_without_the_others_the_server_ends(quick: None, name: str) -> None:
  ended = threading.Event()
  with contextlib.closing(fake.RunningServer(fake.make_engine)) as running:
    running.server.on_failed = ended.set
    FATAL[name](running)
    assert ended.wait(fake.TIMEOUT_S)
    assert running.server.fault is not None
    for dead in (running.server._grpc, running.server._grpc._server):
      # A process would end now. Freed in this one, without its task, it would
      # wait for ever: in whichever test then looks for garbage.
      ctypes.pythonapi.Py_IncRef(ctypes.py_object(dead))


_DYING = """\
from tests.server import fake
from sarathi_jax.server import main, server
class Runner(fake.GatedRunner):
  num_left = 3
  def fetch(self, pending):
    self.num_left -= 1
    if self.num_left < 0:
      raise {fault}
    return pending
  def recover(self):
    raise RuntimeError('the device is gone')
main.serve(server.ServerConfig(port=0, drain_s=1000),
           lambda: fake.make_engine(runner=Runner))
"""


@pytest.mark.parametrize('fault', ['RuntimeError', 'SystemExit'])
def test_a_process_ends_with_its_engine(fault: str) -> None:
  process = process_test.Process('-c', _DYING.format(fault=fault))
  try:
    stub = process.connect()
    call = stub.Generate(
      pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=[1]),
        sampling=pb.SamplingParams(max_tokens=100),
      ),
      timeout=fake.TIMEOUT_S,
    )
    with pytest.raises(grpc.RpcError):
      list(call)
    assert call.code() is grpc.StatusCode.UNAVAILABLE
    code, err = process.end()
    assert code == 1
    assert 'error: the engine stopped after a fault' in err
  finally:
    process.close()


def _statuses(running: fake.RunningServer) -> dict[str, int]:
  stub = health_pb2_grpc.HealthStub(running.channel)
  return {
    name: stub.Check(health_pb2.HealthCheckRequest(service=name)).status
    for name in ('', health.LIVENESS)
  }


def test_liveness_is_not_readiness(gated: Callable[..., Any]) -> None:
  serving, not_serving = 1, 2
  loaded = threading.Event()

  def make() -> Any:
    assert loaded.wait(fake.TIMEOUT_S)
    return fake.make_engine()

  with contextlib.closing(fake.RunningServer(make, wait=False)) as running:
    assert _statuses(running) == {'': not_serving, 'liveness': serving}
    loaded.set()
    running.warming.result(fake.TIMEOUT_S)
    assert _statuses(running) == {'': serving, 'liveness': serving}
    running.run(running.server.drain())
    assert _statuses(running) == {'': not_serving, 'liveness': serving}
  running, runner = gated()
  runner.fault, runner.is_gone = RuntimeError('a step failed'), True
  runner.open()
  with pytest.raises(grpc.RpcError):
    list(running.generate(token_ids=[1]))
  fake.wait_until(
    lambda: _statuses(running) == {'': not_serving, 'liveness': not_serving}
  )


def test_a_step_that_hangs_is_not_alive(
  quick: None, caplog: pytest.LogCaptureFixture
) -> None:
  serving, not_serving = 1, 2
  runners: list[fake.GatedRunner] = []

  def make() -> Any:
    time.sleep(0.5)  # a load, and what is compiled then, takes its time
    return fake.make_engine(
      lambda *args: runners.append(fake.GatedRunner(*args)) or runners[0]
    )  # type: ignore[func-returns-value]

  with contextlib.closing(
    fake.RunningServer(make, wait=False, max_step_s=0.3)
  ) as running:
    seen = set()
    while not running.warming.done():
      seen.add(_statuses(running)['liveness'])
    assert seen == {serving}
    call = running.generate(token_ids=[1], sampling={'max_tokens': 3})
    fake.wait_until(lambda: _statuses(running)['liveness'] == not_serving)
    assert not running.server.watch.is_up()['engine']
    assert 'A step has taken more than max_step_s=0.3 s.' in caplog.text
    runners[0].open()
    assert fake.take(call) == [2, 3, 4]
    fake.wait_until(
      lambda: _statuses(running) == {'': serving, 'liveness': serving}
    )
    # One that was taken to hang, and dies then, does not come back.
    runners[0].close()
    call = running.generate(token_ids=[1])
    fake.wait_until(lambda: _statuses(running)['liveness'] == not_serving)
    runners[0].fault, runners[0].is_gone = RuntimeError('gone'), True
    runners[0].open()
    with pytest.raises(grpc.RpcError):
      list(call)
    fake.wait_until(lambda: _statuses(running)[''] == not_serving)
    time.sleep(0.1)  # for a few looks
    assert _statuses(running)['liveness'] == not_serving


def test_pauses_grow_and_a_start_that_fails_is_tried_again(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  monkeypatch.setattr(background, '_LOOK_S', 0.0)
  monkeypatch.setattr(background, '_PAUSE_S', 0.01)
  monkeypatch.setattr(background, '_MAX_PAUSE_S', 0.04)
  starts: list[float] = []
  faults: list[errors.EngineDeadError] = []

  async def run() -> None:
    loop = asyncio.get_running_loop()

    def restart() -> None:
      starts.append(loop.time())
      if len(starts) % 2:
        raise RuntimeError('can not')

    watch = background.Watch(faults.append)
    watch.add(background.Background('x', lambda: 'a fault', restart))
    watch.start()
    while len(starts) < 5:
      await asyncio.sleep(0.001)
    await watch.stop()
    assert watch.num_restarts == {'x': 5} and watch.is_up() == {'x': False}

  asyncio.run(run())
  gaps = [b - a for a, b in itertools.pairwise(starts)]
  assert all(
    gap >= least
    for gap, least in zip(gaps, (0.02, 0.04, 0.04, 0.04), strict=True)
  )
  assert not faults
