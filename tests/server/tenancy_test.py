# SPDX-License-Identifier: Apache-2.0
"""Tenants of one server: whose turn it is, who may do what, who sees what."""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import pathlib
from typing import Any

import grpc
import pytest
from smg_grpc_proto import vllm_engine_pb2 as vllm
from smg_grpc_proto import vllm_engine_pb2_grpc

from sarathi_jax import types
from sarathi_jax.server import open_inference_pb2 as oip
from sarathi_jax.server import open_inference_pb2_grpc
from sarathi_jax.server import sarathi_pb2 as pb
from tests.server import fake

_TOKENS = """\
ann ann-secret
ann ann-other
bob bob-secret priority=-2
low low-secret priority=3
ops ops-secret admin
"""
_CODE = grpc.StatusCode
_LONG = {'max_tokens': 100}


def _as(name: str, client: str = '') -> list[tuple[str, str]]:
  """The metadata of a caller."""
  metadata = [('authorization', f'Bearer {name}-secret')]
  return metadata + ([('x-client-id', client)] if client else [])


@pytest.fixture
def tokens(tmp_path: pathlib.Path) -> pathlib.Path:
  path = tmp_path / 'tokens'
  path.write_text(_TOKENS)
  return path


@pytest.fixture
def guarded(
  gated: Callable[..., Any],
  tokens: pathlib.Path,
) -> Callable[..., Any]:
  """Makes (server, runner) with tokens."""

  def make(**changes: Any) -> Any:
    return gated(config={'auth_tokens': tokens}, **changes)

  return make


def _generate(
  running: fake.RunningServer,
  metadata: Any,
  request_id: str | None = None,
  priority: int = 0,
  **sampling: Any,
) -> Any:
  return running.stub.Generate(
    pb.GenerateRequest(
      token_ids=pb.TokenIds(ids=[1]),
      request_id=request_id,
      priority=priority,
      sampling=pb.SamplingParams(**{'max_tokens': 2, **sampling}),
    ),
    metadata=metadata,
    timeout=fake.TIMEOUT_S,
  )


def _vllm(running: fake.RunningServer) -> Any:
  return vllm_engine_pb2_grpc.VllmEngineStub(running.channel)


def _open_inference(running: fake.RunningServer) -> Any:
  return open_inference_pb2_grpc.GRPCInferenceServiceStub(running.channel)


def _infer_request(**parameters: int) -> oip.ModelInferRequest:
  request = oip.ModelInferRequest(model_name='counting')
  request.inputs.add(
    name='input_ids',
    datatype='INT64',
    shape=[1],
    contents=oip.InferTensorContents(int64_contents=[1]),
  )
  for name, value in parameters.items():
    request.parameters[name].int64_param = value
  return request


def _end(call: Any) -> tuple[grpc.StatusCode, str]:
  with contextlib.suppress(grpc.RpcError):
    list(call)
  return call.code(), call.details()


def _order(running: fake.RunningServer) -> list[str]:
  """Fills with the names of those that begin, as they do."""
  order: list[str] = []
  add = running.engine.add

  def spy(request: types.Request) -> None:
    order.append(request.request_id)
    add(request)

  running.engine.add = spy  # type: ignore[method-assign]
  return order


# -- Whose turn it is --


def test_a_tenant_gains_nothing_by_more_clients(
  guarded: Callable[..., Any],
) -> None:
  running, runner = guarded(max_num_seqs=1)
  order = _order(running)
  calls = [_generate(running, _as('ann'), 'first')]
  running.wait_until_open(1)
  for i in range(6):
    calls.append(_generate(running, _as('bob', f'b{i}'), f'bob {i}'))
    running.wait_until_open(len(calls))
  for i in range(3):
    calls.append(_generate(running, _as('ann'), f'ann {i}'))
    running.wait_until_open(len(calls))
  runner.open()
  assert {_end(call)[0] for call in calls} == {_CODE.OK}
  assert sum('bob' in name for name in order[:8]) == 4, order


def test_a_tenants_clients_take_turns(guarded: Callable[..., Any]) -> None:
  running, runner = guarded(max_num_seqs=1)
  order = _order(running)
  calls = [_generate(running, _as('bob'), 'first')]
  running.wait_until_open(1)
  for name in ('x1', 'x2', 'x3', 'y1', 'y2'):
    calls.append(_generate(running, _as('ann', name[0]), name))
    running.wait_until_open(len(calls))
  runner.open()
  assert {_end(call)[0] for call in calls} == {_CODE.OK}
  assert [name[0] for name in order[1:5]] in (
    ['x', 'y', 'x', 'y'],
    ['x', 'y', 'y', 'x'],
  )


def test_two_tokens_of_one_name_are_one_tenant(
  guarded: Callable[..., Any],
) -> None:
  running, runner = guarded()
  call = _generate(running, _as('ann'), 'r', **_LONG)
  runner.let(1)
  assert next(call).token_ids[0] == 2
  reply = running.stub.Abort.future(
    pb.AbortRequest(request_ids=['r']),
    metadata=[('authorization', 'Bearer ann-other')],
  )
  fake.step_until_done(reply, runner)
  assert list(reply.result().aborted) == ['r']
  runner.open()


def test_output_counts_though_its_reader_leaves(
  guarded: Callable[..., Any],
) -> None:
  running, runner = guarded(max_num_seqs=1)
  order = _order(running)
  call = _generate(running, _as('bob'), 'left', **_LONG)
  runner.let(20)
  tokens: list[int] = []
  while len(tokens) < 10:
    tokens += next(call).token_ids
  waiting = [_generate(running, _as(name), name) for name in ('bob', 'ann')]
  running.wait_until_open(3)
  call.cancel()
  running.wait_until_open(2)
  runner.open()
  assert {_end(call)[0] for call in waiting} == {_CODE.OK}
  assert order == ['left', 'ann', 'bob']


# -- Who may do what --


@pytest.mark.parametrize(
  'name, priority, least',
  [('ann', -1, 0), ('bob', -3, -2), ('low', 2, 3), ('low', -(2**31), 3)],
)
def test_a_priority_beyond_the_token_is_refused(
  guarded: Callable[..., Any], name: str, priority: int, least: int
) -> None:
  running, runner = guarded()
  runner.open()
  says = f'priority={priority}: must be >= {least}'
  code, details = _end(_generate(running, _as(name), priority=priority))
  assert code is _CODE.PERMISSION_DENIED and says in details
  for allowed in (least, 2**31 - 1):
    assert _end(_generate(running, _as(name), priority=allowed))[0] is _CODE.OK
  with pytest.raises(grpc.RpcError) as caught:
    _open_inference(running).ModelInfer(
      _infer_request(priority=priority), metadata=_as(name)
    )
  assert caught.value.code() is _CODE.PERMISSION_DENIED
  last = list(
    _open_inference(running).ModelStreamInfer(
      iter([_infer_request(priority=priority)]), metadata=_as(name)
    )
  )[-1]
  assert f'[PERMISSION_DENIED] {says}' in last.error_message


def test_an_administrator_may_ask_for_any_priority(
  guarded: Callable[..., Any],
) -> None:
  running, runner = guarded()
  runner.open()
  call = _generate(running, _as('ops'), priority=-(2**31))
  assert _end(call)[0] is _CODE.OK


@pytest.mark.parametrize('protocol', ['sarathi', 'vllm'])
@pytest.mark.parametrize('phase', ['running', 'waiting'])
def test_only_its_owner_or_an_administrator_aborts_a_request(
  guarded: Callable[..., Any], protocol: str, phase: str
) -> None:
  running, runner = guarded(max_num_seqs=1)
  thread = running.server.frontend.engine_thread

  def abort(name: str) -> Any:
    stub, message = {
      'sarathi': (running.stub, pb.AbortRequest(request_ids=['r'])),
      'vllm': (_vllm(running), vllm.AbortRequest(request_ids=['r'])),
    }[protocol]
    reply = stub.Abort.future(message, metadata=_as(name), timeout=10)
    fake.step_until_done(reply, runner)
    reply.result()

  for owner, other, ends_it in (('ann', 'bob', 'ann'), ('ann', 'bob', 'ops')):
    first = None
    if phase == 'waiting':
      first = _generate(running, _as('low'), priority=3, **_LONG)
      running.wait_until_open(1)
    call = _generate(running, _as(owner, 'app'), 'r', **_LONG)
    running.wait_until_open(1 if first is None else 2)
    if first is None:
      runner.let(3)  # one of them for a batch that was launched ahead
      assert next(call).token_ids[0] == 2
    abort(other)
    assert 'r' in {
      s.request.request_id for s in (*thread._waiting, *thread._streams)
    }
    abort(ends_it)
    assert list(call)[-1].finished.finish_reason == pb.FINISH_REASON_ABORT
    if first is not None:
      first.cancel()
    running.wait_until_open(0)
  runner.open()


def test_without_tokens_only_the_same_address_aborts() -> None:
  with contextlib.closing(fake.RunningServer(fake.make_engine)) as running:
    thread = running.server.frontend.engine_thread
    stream = running.run(
      _submit(
        thread,
        types.Request(
          request_id='r',
          prompt_token_ids=(1,),
          tenant='ipv4:10.0.0.1',
          sampling=types.SamplingParams(max_tokens=100),
        ),
      )
    )
    reply = running.stub.Abort(pb.AbortRequest(request_ids=['r']))
    assert not reply.aborted
    del stream


async def _submit(thread: Any, request: types.Request) -> Any:
  return thread.submit(request)


def test_tenants_ids_do_not_meet(guarded: Callable[..., Any]) -> None:
  running, runner = guarded()
  calls = [
    _generate(running, _as(name), 'r', max_tokens=4) for name in ('ann', 'bob')
  ]
  running.wait_until_open(2)
  runner.open()
  for call in calls:
    responses = list(call)
    assert {r.request_id for r in responses} == {'r'}
    assert [t for r in responses for t in r.token_ids] == [2, 3, 4, 5]


def test_a_client_id_has_a_bound(guarded: Callable[..., Any]) -> None:
  running, runner = guarded()
  runner.open()
  long = _as('ann', 'x' * 1000)
  for call in (
    _generate(running, long),
    _vllm(running).Generate(
      vllm.GenerateRequest(tokenized=vllm.TokenizedInput(input_ids=[1])),
      metadata=long,
    ),
  ):
    code, details = _end(call)
    assert code is _CODE.INVALID_ARGUMENT and 'x-client-id: has 1,00' in details
  (answer,) = _open_inference(running).ModelStreamInfer(
    iter([_infer_request()]), metadata=long
  )
  assert 'x-client-id: has 1,00' in answer.error_message
  assert _end(_generate(running, _as('ann', 'x' * 200)))[0] is _CODE.OK
