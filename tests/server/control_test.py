# SPDX-License-Identifier: Apache-2.0
"""sarathi.v1.Control: pause, resume, drain, weights, budget, traces."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import functools
import gzip
import itertools
import json
import pathlib
import threading
from typing import Any

import grpc
import pytest

from sarathi_jax import errors
from sarathi_jax.engine import fake_runner
from sarathi_jax.server import sarathi_pb2 as pb
from sarathi_jax.server import sarathi_pb2_grpc
from sarathi_jax.server.protocols import control_v1
from tests.server import fake


def _control(running: fake.RunningServer) -> Any:
  return sarathi_pb2_grpc.ControlStub(running.channel)


@pytest.fixture
def events(
  tmp_path: pathlib.Path,
) -> Iterator[tuple[fake.RunningServer, list[Any]]]:
  """A server whose hooks note down that they were called."""
  done: list[Any] = []

  def load(path: str) -> str:
    if path == 'bad':
      raise errors.CheckpointError(f'{path}: is of another model.')
    return f'weights of {path}'

  hooks = control_v1.Hooks(
    load_weights=load,
    update_weights=lambda *args: done.append(args),
    start_profile=lambda folder: done.append(('start', folder)),
    stop_profile=lambda: done.append('stop'),
  )
  # Calls are to come while requests run, on a busy machine, too.
  slow = functools.partial(fake_runner.FakeRunner, step_s=5e-4)
  with contextlib.closing(
    fake.RunningServer(
      functools.partial(
        fake.make_engine, slow, max_model_len=2**16, num_pages=2**15
      ),
      hooks=hooks,
      trace_dir=tmp_path / 'traces',
    )
  ) as running:
    yield running, done


def _refusal(call: Callable[[], Any]) -> tuple[grpc.StatusCode, str]:
  with pytest.raises(grpc.RpcError) as caught:
    call()
  return caught.value.code(), caught.value.details()


def test_pause_keeps_requests_where_they_are(
  events: tuple[fake.RunningServer, list[Any]],
) -> None:
  running, _ = events
  call = running.generate(token_ids=[1], sampling={'max_tokens': 3000})
  assert next(call).token_ids[0] == 2
  _control(running).Pause(pb.PauseRequest())
  num_steps = running.stats().num_steps
  late = running.generate(token_ids=[5], sampling={'max_tokens': 2})
  running.wait_until_open(2)
  stats = running.stats()
  assert stats.num_steps == num_steps and stats.is_paused
  assert (stats.num_running, stats.num_queued) == (1, 1)
  states = _control(running).ListRequests(pb.ListRequestsRequest()).requests
  assert [(s.is_running, s.max_output_tokens) for s in states] == [(True, 3000)]
  _control(running).Resume(pb.ResumeRequest())
  assert fake.take(late) == [6, 7]
  assert fake.take(call)[-1] == (1 + 3000) % 64
  assert running.is_alive()


def test_pause_can_wait_for_those_that_run(
  events: tuple[fake.RunningServer, list[Any]],
) -> None:
  running, _ = events
  call = running.generate(token_ids=[1], sampling={'max_tokens': 500})
  first = list(next(call).token_ids)
  _control(running).Pause(pb.PauseRequest(mode=pb.PAUSE_MODE_WAIT))
  assert running.stats().num_running == 0
  assert len(first + fake.take(call)) == 500
  late = running.generate(token_ids=[5], sampling={'max_tokens': 2})
  running.wait_until_open(1)
  assert running.stats().num_queued == 1
  _control(running).Resume(pb.ResumeRequest())
  assert fake.take(late) == [6, 7]


def test_pause_can_abort_those_that_run(
  events: tuple[fake.RunningServer, list[Any]],
) -> None:
  running, _ = events
  call = running.generate(token_ids=[1], sampling={'max_tokens': 3000})
  assert next(call).token_ids[0] == 2
  _control(running).Pause(pb.PauseRequest(mode=pb.PAUSE_MODE_ABORT))
  assert list(call)[-1].finished.finish_reason == pb.FINISH_REASON_ABORT
  _control(running).Resume(pb.ResumeRequest())
  assert running.is_alive()


def test_drain_and_resume(events: tuple[fake.RunningServer, list[Any]]) -> None:
  running, _ = events
  _control(running).Drain(pb.DrainRequest())
  code, _ = _refusal(lambda: list(running.generate(token_ids=[1])))
  assert code is grpc.StatusCode.UNAVAILABLE
  _control(running).Resume(pb.ResumeRequest())
  assert running.is_alive()


def test_update_weights(events: tuple[fake.RunningServer, list[Any]]) -> None:
  running, done = events
  for on_update in ('recompute', 'keep'):
    response = _control(running).UpdateWeights(
      pb.UpdateWeightsRequest(
        path='x', on_update=f'ON_UPDATE_{on_update.upper()}'
      )
    )
    assert done.pop() == ('weights of x', on_update)
    assert response.pause_s >= 0 and response.version == 0  # of the fake
  code, details = _refusal(
    lambda: _control(running).UpdateWeights(
      pb.UpdateWeightsRequest(path='x', on_update=7)
    )
  )
  assert code is grpc.StatusCode.INVALID_ARGUMENT and 'on_update=7' in details
  for path, says in (('bad', 'another model'), ('', 'path')):
    code, details = _refusal(
      lambda path=path: _control(running).UpdateWeights(
        pb.UpdateWeightsRequest(path=path)
      )
    )
    assert code is grpc.StatusCode.INVALID_ARGUMENT and says in details
  assert not done and running.is_alive()


def test_weights_that_are_lost_end_the_server() -> None:
  """Liveness, and whoever started it, know at once; not the next client."""

  def lose(weights: Any, on_update: str) -> None:
    raise errors.EngineDeadError('the weights are gone')

  hooks = control_v1.Hooks(load_weights=str, update_weights=lose)
  with contextlib.closing(
    fake.RunningServer(fake.make_engine, hooks=hooks)
  ) as running:
    failed = threading.Event()
    running.server.on_failed = failed.set
    call = running.generate(token_ids=[1], sampling={'max_tokens': 120})
    code, details = _refusal(
      lambda: _control(running).UpdateWeights(pb.UpdateWeightsRequest(path='x'))
    )
    assert code is grpc.StatusCode.UNAVAILABLE and 'are gone' in details
    assert failed.wait(fake.TIMEOUT_S)
    assert isinstance(running.server.fault, errors.EngineDeadError)
    del call


def test_reset_cache_recomputes_what_runs(
  events: tuple[fake.RunningServer, list[Any]],
) -> None:
  running, _ = events
  call = running.generate(token_ids=[1], sampling={'max_tokens': 3000})
  tokens = list(next(call).token_ids)
  _control(running).ResetCache(pb.ResetCacheRequest())
  responses = list(call)
  tokens += [t for r in responses for t in r.token_ids]
  assert tokens == [(2 + k) % 64 for k in range(3000)]
  assert responses[-1].finished.timing.num_preemptions == 1


def test_the_token_budget_can_be_changed(
  events: tuple[fake.RunningServer, list[Any]],
) -> None:
  running, _ = events
  _control(running).SetTokenBudget(pb.SetTokenBudgetRequest(token_budget=4))
  before = running.stats().num_steps
  list(running.generate(token_ids=[1] * 40, sampling={'max_tokens': 1}))
  assert running.stats().num_steps - before == 10
  assert running.stats().token_budget == 4
  for budget in (3, 9):  # max_num_seqs is 4; 8 was compiled
    code, details = _refusal(
      lambda budget=budget: _control(running).SetTokenBudget(
        pb.SetTokenBudgetRequest(token_budget=budget)
      )
    )
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert '[4, 8]' in details
  _control(running).SetTokenBudget(pb.SetTokenBudgetRequest(token_budget=8))
  assert running.is_alive()


def test_profile_for_some_steps(
  events: tuple[fake.RunningServer, list[Any]],
) -> None:
  running, done = events
  reply = _control(running).Profile.future(pb.ProfileRequest(num_steps=5))
  fake.wait_until(lambda: bool(done))
  list(running.generate(token_ids=[1], sampling={'max_tokens': 10}))
  folder = pathlib.Path(reply.result(fake.TIMEOUT_S).folder)
  assert done == [('start', str(folder)), 'stop']
  assert folder.is_dir() and folder.parent.name == 'traces'


def test_a_second_profile_is_told_when_to_try_again(
  events: tuple[fake.RunningServer, list[Any]],
) -> None:
  running, done = events
  first = _control(running).Profile.future(pb.ProfileRequest(num_steps=5))
  fake.wait_until(lambda: bool(done))
  with pytest.raises(grpc.RpcError) as caught:
    _control(running).Profile(pb.ProfileRequest(num_steps=1))
  assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
  assert int(dict(caught.value.trailing_metadata())['retry-after']) > 0
  first.cancel()
  fake.wait_until(lambda: done[-1] == 'stop')


def test_a_profile_that_is_cancelled_ends(
  events: tuple[fake.RunningServer, list[Any]],
) -> None:
  running, done = events
  reply = _control(running).Profile.future(pb.ProfileRequest(num_steps=5))
  fake.wait_until(lambda: bool(done))
  reply.cancel()
  fake.wait_until(lambda: done[-1] == 'stop')
  assert running.is_alive()


def _check_trace(events: list[dict[str, Any]], num_tokens: int) -> None:
  steps = [e for e in events if e.get('cat') == 'step']
  assert sum(e['args']['tokens'] for e in steps) >= num_tokens
  for before, after in itertools.pairwise(steps):
    assert before['ts'] + before['dur'] <= after['ts'] + after['dur']
  spans = [e for e in events if e.get('cat') == 'request']
  assert {e['name'] for e in spans} == {'r', 'queued', 'prefill', 'decode'}
  begun = {(e['id'], e['name']): e['ts'] for e in spans if e['ph'] == 'b'}
  ended = {(e['id'], e['name']): e['ts'] for e in spans if e['ph'] == 'e'}
  assert begun.keys() == ended.keys()
  assert all(begun[key] <= ended[key] for key in begun)


def test_a_trace_on_demand(
  events: tuple[fake.RunningServer, list[Any]],
) -> None:
  running, _ = events
  call = _control(running).Trace(pb.TraceRequest(seconds=0.3))
  fake.wait_until(lambda: len(running.engine._observers) == 2)
  list(
    running.generate(
      token_ids=[1] * 9, request_id='r', sampling={'max_tokens': 5}
    )
  )
  data = b''.join(chunk.data for chunk in call)
  _check_trace(json.loads(gzip.decompress(data)), 9 + 4)
  fake.wait_until(lambda: len(running.engine._observers) == 1)


def test_a_trace_of_everything(tmp_path: pathlib.Path) -> None:
  with contextlib.closing(
    fake.RunningServer(fake.make_engine, trace_dir=tmp_path)
  ) as running:
    list(
      running.generate(
        token_ids=[1] * 9, request_id='r', sampling={'max_tokens': 5}
      )
    )
  (file,) = tmp_path.glob('trace-*.json')
  text = file.read_text().rstrip().rstrip(',') + ']'  # as viewers read it
  _check_trace(json.loads(text), 9 + 4)


@pytest.mark.parametrize(
  'method, request_, says',
  [
    ('Pause', pb.PauseRequest(mode=9), 'mode=9'),
    ('Profile', pb.ProfileRequest(num_steps=0), 'num_steps=0'),
    ('SetTokenBudget', pb.SetTokenBudgetRequest(), 'token_budget=0'),
  ],
)
def test_bad_calls_are_refused(
  events: tuple[fake.RunningServer, list[Any]],
  method: str,
  request_: Any,
  says: str,
) -> None:
  code, details = _refusal(
    lambda: getattr(_control(events[0]), method)(request_)
  )
  assert code is grpc.StatusCode.INVALID_ARGUMENT and says in details


@pytest.mark.parametrize('seconds', [0, -1, float('nan'), float('inf'), 1e9])
def test_bad_traces_are_refused(
  events: tuple[fake.RunningServer, list[Any]], seconds: float
) -> None:
  code, details = _refusal(
    lambda: list(_control(events[0]).Trace(pb.TraceRequest(seconds=seconds)))
  )
  assert code is grpc.StatusCode.INVALID_ARGUMENT and 'seconds' in details


def test_what_a_model_can_not_do_is_refused(server: fake.RunningServer) -> None:
  for call in (
    lambda: _control(server).UpdateWeights(pb.UpdateWeightsRequest(path='x')),
    lambda: _control(server).Profile(pb.ProfileRequest(num_steps=1)),
  ):
    assert _refusal(call)[0] is grpc.StatusCode.INVALID_ARGUMENT
