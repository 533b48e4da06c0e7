# SPDX-License-Identifier: Apache-2.0
"""Loading, serving, a fault, draining: what health says and clients get."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import threading
from typing import Any

import grpc
from grpc_health.v1 import health_pb2
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import proto_reflection_descriptor_database
import pytest

from sarathi_jax import errors
from sarathi_jax.server import sarathi_pb2 as pb
from sarathi_jax.server import sarathi_pb2_grpc
from sarathi_jax.server import server as server_lib
from sarathi_jax.server.protocols import sarathi_v1
from tests.server import fake

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def _health(running: fake.RunningServer) -> set[int]:
  """What the server says of itself as a whole and of our service."""
  stub = health_pb2_grpc.HealthStub(running.channel)
  return {
    stub.Check(health_pb2.HealthCheckRequest(service=name)).status
    for name in ('', 'sarathi.v1.Sarathi')
  }


def _refusal(call: Any) -> tuple[grpc.StatusCode, str]:
  with pytest.raises(grpc.RpcError):
    list(call)
  return call.code(), call.details()


@pytest.fixture
def loading() -> Iterator[tuple[fake.RunningServer, threading.Event]]:
  loaded = threading.Event()

  def make() -> Any:
    assert loaded.wait(fake.TIMEOUT_S)
    return fake.make_engine()

  with contextlib.closing(fake.RunningServer(make, wait=False)) as running:
    yield running, loaded
    loaded.set()


def test_not_serving_until_warm(
  loading: tuple[fake.RunningServer, threading.Event],
) -> None:
  running, loaded = loading
  assert _health(running) == {NOT_SERVING}
  code, details = _refusal(running.generate(token_ids=[1]))
  assert (code, details) == (
    grpc.StatusCode.UNAVAILABLE,
    'the model is being loaded',
  )
  with pytest.raises(grpc.RpcError) as refusal:
    running.stub.GetModelInfo(pb.GetModelInfoRequest())
  assert refusal.value.code() is grpc.StatusCode.UNAVAILABLE
  loaded.set()
  running.warming.result(fake.TIMEOUT_S)
  assert _health(running) == {SERVING}
  assert running.is_alive()


def test_reflection_lists_and_describes_the_services(
  server: fake.RunningServer,
) -> None:
  database = (
    proto_reflection_descriptor_database.ProtoReflectionDescriptorDatabase(
      server.channel
    )
  )
  assert {sarathi_v1.NAME, 'grpc.health.v1.Health'} <= set(
    database.get_services()
  )
  described = database.FindFileContainingSymbol(sarathi_v1.NAME)
  assert {m.name for m in described.service[0].method} == {
    'Generate',
    'Abort',
    'GetModelInfo',
    'GetStats',
  }


def test_a_fault_fails_all_and_shows_in_health(
  gated: Callable[..., Any],
) -> None:
  running, runner = gated()
  calls = [running.generate(token_ids=[1], sampling={'max_tokens': 100})]
  runner.let(1)
  assert next(calls[0]).token_ids[0] == 2
  calls += [running.generate(token_ids=[1]) for _ in range(5)]  # some queued
  running.wait_until_open(6)
  runner.fault, runner.is_gone = RuntimeError('a step failed'), True
  runner.let(1)
  for call in calls:
    code, details = _refusal(call)
    assert code is grpc.StatusCode.UNAVAILABLE
    assert 'RuntimeError' in details and 'device' not in details
  fake.wait_until(lambda: _health(running) == {NOT_SERVING})
  assert _refusal(running.generate(token_ids=[1]))[0] is (
    grpc.StatusCode.UNAVAILABLE
  )


def test_a_step_that_fails_ends_what_was_in_it_and_nothing_else(
  gated: Callable[..., Any],
) -> None:
  running, runner = gated(max_num_seqs=2)
  in_it = [
    running.generate(token_ids=[i], sampling={'max_tokens': 100})
    for i in (1, 2)
  ]
  running.wait_until_open(2)
  runner.let(6)
  assert [next(call).token_ids[0] for call in in_it] == [2, 3]
  waiting = running.generate(token_ids=[7], sampling={'max_tokens': 4})
  running.wait_until_open(3)
  runner.fault = RuntimeError('a step failed')
  runner.open()
  for call in in_it:
    code, details = _refusal(call)
    assert code is grpc.StatusCode.INTERNAL and 'RuntimeError' in details
  assert fake.take(waiting) == [8, 9, 10, 11]
  assert running.is_alive() and _health(running) == {SERVING}
  assert running.engine.metrics.num_step_faults == 1


def test_an_engine_whose_every_step_fails_is_given_up(
  gated: Callable[..., Any],
) -> None:
  running, runner = gated()
  runner.open()

  def fail(pending: Any) -> Any:
    raise RuntimeError('a step failed')

  runner.fetch = fail
  codes = [_refusal(running.generate(token_ids=[1]))[0] for _ in range(5)]
  assert codes == [grpc.StatusCode.INTERNAL] * 3 + (
    [grpc.StatusCode.UNAVAILABLE] * 2
  )
  fake.wait_until(lambda: _health(running) == {NOT_SERVING})


def test_draining_lets_open_requests_finish_and_refuses_new_ones(
  gated: Callable[..., Any],
) -> None:
  running, runner = gated()
  call = running.generate(token_ids=[1], sampling={'max_tokens': 5})
  runner.let(1)
  assert next(call).token_ids[0] == 2
  draining = running.submit(running.server.drain())
  fake.wait_until(lambda: _health(running) == {NOT_SERVING})
  code, details = _refusal(running.generate(token_ids=[1]))
  assert (code, details) == (
    grpc.StatusCode.UNAVAILABLE,
    'the server is shutting down',
  )
  assert not draining.done()
  runner.open()
  assert fake.take(call) == [3, 4, 5, 6]
  draining.result(fake.TIMEOUT_S)


def _drain(running: fake.RunningServer, by: str) -> Any:
  if by == 'Control':
    stub: Any = sarathi_pb2_grpc.ControlStub(running.channel)
    return stub.Drain.future(pb.DrainRequest(), timeout=fake.TIMEOUT_S)
  return running.submit(running.server.drain())


@pytest.mark.parametrize('by', ['SIGTERM', 'Control'])
def test_a_drain_refuses_at_once_what_can_not_begin(
  gated: Callable[..., Any], by: str
) -> None:
  running, runner = gated(max_num_seqs=1)
  call = running.generate(token_ids=[1], sampling={'max_tokens': 5})
  runner.let(1)
  assert next(call).token_ids[0] == 2
  waiting = [running.generate(token_ids=[1]) for _ in range(20)]
  running.wait_until_open(21)
  draining = _drain(running, by)
  for other in waiting:  # though no step completes meanwhile
    assert _refusal(other) == (
      grpc.StatusCode.UNAVAILABLE,
      'the server is shutting down',
    )
  assert not draining.done()
  runner.open()
  assert fake.take(call) == [3, 4, 5, 6]
  draining.result(fake.TIMEOUT_S)


@pytest.mark.parametrize('by', ['SIGTERM', 'Control'])
def test_a_drain_serves_what_can_begin(
  gated: Callable[..., Any], by: str
) -> None:
  running, runner = gated(max_num_seqs=3, token_budget=6)
  calls = [running.generate(token_ids=[1] * 3, sampling={'max_tokens': 5})]
  runner.let(1)
  assert next(calls[0]).token_ids[0] == 2
  for i in range(4):  # room is for two of them
    calls.append(running.generate(token_ids=[1] * 3))
    running.wait_until_open(i + 2)
  draining = _drain(running, by)
  fake.wait_until(lambda: _health(running) == {NOT_SERVING})
  runner.open()
  assert fake.take(calls[0]) == [3, 4, 5, 6]
  assert [len(fake.take(call)) for call in calls[1:3]] == [16, 16]
  for call in calls[3:]:
    assert _refusal(call)[0] is grpc.StatusCode.UNAVAILABLE
  draining.result(fake.TIMEOUT_S)


@pytest.mark.parametrize('by', ['SIGTERM', 'Control'])
def test_a_drain_ends_a_pause(gated: Callable[..., Any], by: str) -> None:
  running, runner = gated(max_num_seqs=1)
  runner.open()
  control: Any = sarathi_pb2_grpc.ControlStub(running.channel)
  control.Pause(pb.PauseRequest())
  calls = []
  for i in range(2):
    calls.append(running.generate(token_ids=[1], sampling={'max_tokens': 3}))
    running.wait_until_open(i + 1)
  _drain(running, by).result(fake.TIMEOUT_S)
  assert fake.take(calls[0]) == [2, 3, 4]
  assert _refusal(calls[1])[0] is grpc.StatusCode.UNAVAILABLE
  if by == 'Control':
    control.Resume(pb.ResumeRequest())
    assert running.is_alive()


def test_what_outlasts_the_drain_is_cut_off_with_a_status(
  gated: Callable[..., Any],
) -> None:
  running, runner = gated(config={'drain_s': 0.01})
  call = running.generate(token_ids=[1], sampling={'max_tokens': 100})
  runner.let(1)
  assert next(call).token_ids[0] == 2
  running.run(running.server.drain())
  stopping = running.submit(running.server.stop())  # a step is under way
  code, details = _refusal(call)
  assert (code, details) == (
    grpc.StatusCode.UNAVAILABLE,
    'the server is shutting down',
  )
  runner.open()
  stopping.result(fake.TIMEOUT_S)


def test_a_port_in_use_is_refused(server: fake.RunningServer) -> None:
  async def start_another() -> None:
    config = server_lib.ServerConfig(port=server.server.port)
    await server_lib.Server(config, fake.make_engine).start()

  with pytest.raises(
    errors.ConfigError, match=f'port={server.server.port}: .*in use'
  ):
    server.run(start_another())


@pytest.mark.parametrize(
  'field, value', [('port', -1), ('port', 65536), ('drain_s', -1.0)]
)
def test_a_bad_config_is_named(field: str, value: float) -> None:
  with pytest.raises(errors.ConfigError, match=f'{field}={value}'):
    server_lib.ServerConfig(**{field: value})
