# SPDX-License-Identifier: Apache-2.0
"""Who waits, who is next, who is turned away; and how clients are told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import hypothesis
from hypothesis import strategies as st
import pytest

from sarathi_jax import errors
from sarathi_jax import types
from sarathi_jax.server import sarathi_pb2 as pb
from sarathi_jax.server.protocols import status
from sarathi_jax.server.queue import admission
from sarathi_jax.server.queue import outbox
from tests.server import fake


def _request(
  name: str, *, client: str = '', num_tokens: int = 1, priority: int = 0
) -> types.Request:
  return types.Request(
    request_id=name,
    prompt_token_ids=(1,) * num_tokens,
    client=client,
    priority=priority,
  )


def _queue(*requests: types.Request, **limits: Any) -> admission.Queue:
  queue = admission.Queue(admission.Limits(**limits))
  for request in requests:
    _push(queue, request)
  return queue


def _push(queue: admission.Queue, request: types.Request) -> None:
  queue.push(outbox.Stream(request, lambda stream: None))


def _order(queue: admission.Queue) -> str:
  return ''.join(_order_ids(queue))


def test_one_client_is_served_in_order_of_arrival() -> None:
  assert _order(_queue(*map(_request, 'abc'))) == 'abc'


def test_the_smallest_priority_goes_first() -> None:
  assert (
    _order(
      _queue(
        _request('a'),
        _request('b', priority=-1),
        _request('c', priority=2),
        _request('d', priority=-1),
        _request('e'),
      )
    )
    == 'bdaec'
  )


def test_a_client_with_long_prompts_does_not_hold_up_others() -> None:
  queue = _queue(
    *(_request(c, client='x', num_tokens=100) for c in 'abcd'),
    *(_request(c, client='y', num_tokens=10) for c in 'pqrs'),
  )
  assert _order(queue) == 'apqrsbcd'


def _tenants(*names: str) -> admission.Queue:
  """Requests such as 'xa1': of the tenant x, of its client a."""
  queue = _queue()
  for name in names:
    _push(
      queue,
      types.Request(
        request_id=name, prompt_token_ids=(1,), tenant=name[0], client=name[:2]
      ),
    )
  return queue


def test_turns_are_between_tenants_then_between_their_clients() -> None:
  queue = _tenants('xa1', 'xb1', 'xc1', 'xd1', 'ya1', 'ya2', 'yb1')
  order = _order_ids(queue)
  assert order == ['xa1', 'ya1', 'xb1', 'yb1', 'xc1', 'ya2', 'xd1']


def test_a_client_that_is_new_gets_no_credit_by_an_empty_queue() -> None:
  queue = _queue()
  for i in range(20):  # It has been served a lot, alone.
    _push(queue, _request(f'old {i}', client='old'))
    queue.charge(queue.pop().request, 0, 100)
  for i in range(30):
    _push(queue, _request(f'new {i}', client='new', num_tokens=50))
  _push(queue, _request('old', client='old'))
  assert _order_ids(queue).index('old') < 10


@hypothesis.given(
  st.lists(
    st.tuples(
      st.sampled_from('xyz'), st.sampled_from('abc'), st.integers(1, 9)
    ),
    min_size=9,
    max_size=60,
  )
)
def test_tenants_that_wait_are_served_alike(
  asked: list[tuple[str, str, int]],
) -> None:
  queue = _queue()
  for i, (tenant, client, num_tokens) in enumerate(asked):
    _push(
      queue,
      types.Request(
        request_id=str(i),
        prompt_token_ids=(1,) * num_tokens,
        tenant=tenant,
        client=tenant + client,
      ),
    )
  served = dict.fromkeys('xyz', 0)
  while len(queue):
    waiting = {stream.request.tenant for stream in queue}
    request = queue.pop().request
    served[request.tenant] += len(request.prompt_token_ids)
    counts = [served[tenant] for tenant in waiting]
    assert max(counts) - min(counts) <= 9  # the longest prompt


def test_what_is_remembered_of_names_is_bounded(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  monkeypatch.setattr(admission, '_MAX_KNOWN', 5)
  queue = _queue()
  for i in range(50):
    for tenant in ('x', f't{i}'):
      _push(
        queue,
        types.Request(
          request_id=f'{tenant} {i}',
          prompt_token_ids=(1,),
          tenant=tenant,
          client=f'{tenant}/{i}',
        ),
      )
    queue.pop()
    queue.pop()
  known = [queue._tenants, *queue._clients.values()]
  assert all(len(shares._served) <= 6 for shares in known)
  assert len(queue._clients) <= 6


def test_output_counts_twice() -> None:
  queue = _queue(_request('a', client='x'), _request('b', client='y'))
  queue.charge(_request('c', client='x'), 0, 1)
  assert _order(queue) == 'ba'


def test_who_was_away_gets_no_credit_for_it() -> None:
  queue = _queue(*(_request(c, client='x', num_tokens=100) for c in 'abc'))
  queue.pop()
  queue.pop()
  _push(queue, _request('p', client='y', num_tokens=90))
  _push(queue, _request('q', client='y', num_tokens=90))
  assert _order(queue) in ('cpq', 'pcq')


@hypothesis.given(
  st.lists(
    st.tuples(
      st.sampled_from('xyz'),
      st.integers(1, 9),
      st.integers(-1, 1),
      st.sampled_from(['push', 'push', 'pop', 'remove']),
    ),
    max_size=60,
  )
)
def test_counts_add_up(ops: list[tuple[str, int, int, str]]) -> None:
  queue = _queue()
  here: dict[str, types.Request] = {}
  for i, (client, num_tokens, priority, op) in enumerate(ops):
    if op == 'push':
      here[str(i)] = _request(
        str(i), client=client, num_tokens=num_tokens, priority=priority
      )
      _push(queue, here[str(i)])
    elif op == 'pop' and here:
      request = queue.pop().request
      assert request.priority == min(r.priority for r in here.values())
      del here[request.request_id]
    elif op == 'remove':
      name = next(iter(here), 'none')
      removed = queue.remove(name)
      assert (removed and removed.request) is here.pop(name, None)
    assert len(queue) == len(here)
    assert queue.num_tokens == sum(
      len(r.prompt_token_ids) for r in here.values()
    )
  assert sorted(_order_ids(queue)) == sorted(here)
  assert not queue.line() and not queue._lines


def _order_ids(queue: admission.Queue) -> list[str]:
  return [queue.pop().request.request_id for _ in range(len(queue))]


def test_a_full_queue_refuses_with_a_hint() -> None:
  queue = _queue(_request('a', num_tokens=50), max_waiting=1)
  queue.observe_step(0.08, 8)
  with pytest.raises(errors.CapacityError, match='max_waiting=1') as caught:
    _push(queue, _request('b'))
  assert caught.value.retry_after_s == 0.25
  assert str(caught.value).endswith('; try again in 0.25 s.')
  queue = _queue(_request('a', num_tokens=50), max_waiting_tokens=60)
  with pytest.raises(errors.CapacityError, match='max_waiting_tokens=60'):
    _push(queue, _request('b', num_tokens=11))


@pytest.mark.parametrize(
  'seconds, whole', [(0.1, '1'), (1.0, '1'), (1.4, '2'), (59.5, '60')]
)
def test_nobody_is_told_to_come_too_early(seconds: float, whole: str) -> None:
  assert dict(status.hints(errors.CapacityError('full', seconds))) == {
    'grpc-retry-pushback-ms': f'{seconds * 1e3:.0f}',
    'retry-after': whole,
  }


def test_a_prompt_beyond_the_token_limit_may_wait_alone() -> None:
  queue = _queue(_request('a', num_tokens=50), max_waiting_tokens=10)
  assert len(queue) == 1


@pytest.mark.parametrize(
  'field',
  ['max_waiting', 'max_waiting_tokens', 'max_prompt_tokens', 'max_outbox'],
)
def test_a_bad_limit_is_named(field: str) -> None:
  with pytest.raises(errors.ConfigError, match=f'{field}=0'):
    admission.Limits(**{field: 0})


def _end(call: Any) -> tuple[grpc.StatusCode, str, dict[str, str]]:
  with pytest.raises(grpc.RpcError):
    list(call)
  return call.code(), call.details(), dict(call.trailing_metadata())


def test_overload_is_refused_at_once_with_a_hint(
  gated: Callable[..., Any],
) -> None:
  running, runner = gated(
    max_num_seqs=1, config={'limits': admission.Limits(max_waiting=2)}
  )
  first = running.generate(token_ids=[1], sampling={'max_tokens': 3})
  runner.let(1)
  assert next(first).token_ids[0] == 2
  waiting = []
  for i in range(2):
    waiting.append(
      running.generate(token_ids=[10 * i], sampling={'max_tokens': 3})
    )
    running.wait_until_open(2 + i)
  code, details, trailing = _end(running.generate(token_ids=[1]))
  assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
  assert 'max_waiting=2' in details
  assert int(trailing['grpc-retry-pushback-ms']) > 0
  assert int(trailing['retry-after']) > 0
  runner.open()
  assert [fake.take(call) for call in waiting] == [[1, 2, 3], [11, 12, 13]]
  assert running.is_alive()


def test_priorities_over_the_wire(gated: Callable[..., Any]) -> None:
  running, runner = gated(max_num_seqs=1)
  order: list[str] = []
  add = running.engine.add

  def spy(request: types.Request) -> None:
    order.append(request.request_id)
    add(request)

  running.engine.add = spy
  calls = {}
  for i, (name, priority) in enumerate(
    [('first', 0), ('late', 5), ('soon', 1), ('now', -3)]
  ):
    calls[name] = running.generate(
      token_ids=[1],
      request_id=name,
      priority=priority,
      sampling={'max_tokens': 2},
    )
    running.wait_until_open(i + 1)
  runner.open()
  for call in calls.values():
    assert fake.take(call) == [2, 3]
  assert order == ['first', 'now', 'soon', 'late']


def test_what_can_not_make_its_deadline_is_refused(
  gated: Callable[..., Any],
) -> None:
  running, runner = gated()
  runner.open()
  list(running.generate(token_ids=[1], sampling={'max_tokens': 3}))
  thread = running.server.frontend.engine_thread
  thread._waiting._step_s = 5.0  # as if a step took so long
  code, details, _ = _end(
    running.generate(token_ids=[1] * 20, timeout=10)
  )  # three steps for its prompt alone
  assert code is grpc.StatusCode.DEADLINE_EXCEEDED
  assert 'its prompt alone takes 15 s' in details
  assert running.engine.metrics.num_aborted == 0
  # Of a prompt that was found in the cache but for a page, a step is left.
  thread._waiting._step_s = 0.0
  list(running.generate(token_ids=[1] * 20))
  thread._waiting._step_s = 5.0
  assert fake.take(running.generate(token_ids=[1] * 20, timeout=10))


def test_a_prompt_too_long_for_the_server_is_refused(
  gated: Callable[..., Any],
) -> None:
  running, runner = gated(
    config={'limits': admission.Limits(max_prompt_tokens=3)}
  )
  runner.open()
  code, details, _ = _end(running.generate(token_ids=[1] * 4))
  assert code is grpc.StatusCode.INVALID_ARGUMENT
  assert 'max_prompt_tokens=3' in details
  assert running.is_alive()


def test_a_slow_reader_is_ended_alone(gated: Callable[..., Any]) -> None:
  running, runner = gated(
    max_model_len=2**17,
    num_pages=2**16,
    config={'limits': admission.Limits(max_outbox=50)},
  )
  with grpc.insecure_channel(
    f'127.0.0.1:{running.server.port}',
    options=[
      ('grpc.use_local_subchannel_pool', 1),
      ('grpc.http2.bdp_probe', 0),
      ('grpc.http2.lookahead_bytes', 1024),
    ],
  ) as channel:
    slow = running.stub_of(channel).Generate(
      pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=[1]),
        sampling=pb.SamplingParams(fill_context=True),
      )
    )
    running.wait_until_open(1)
    runner.open()
    fake.wait_until(lambda: running.server.frontend.num_open == 0)
    assert running.is_alive()  # others go on, and its pages are free
    with pytest.raises(grpc.RpcError):
      list(slow)
    assert slow.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert 'reads too slowly' in slow.details()
    assert int(dict(slow.trailing_metadata())['retry-after']) > 0


@pytest.mark.parametrize(('written', 'is_cut_off'), [(0, False), (1, True)])
def test_the_first_write_is_let_end(written: int, is_cut_off: bool) -> None:
  """Else gRPC refuses the status, and the client waits for ever."""
  request = types.Request(request_id='x', prompt_token_ids=(1,))
  delta = types.OutputDelta('x', '', (1,), (0.0,), None)

  async def run() -> list[str]:
    stream, said = outbox.Stream(request, lambda stream: None, 1), []
    stuck = asyncio.Event()

    async def read() -> None:
      num_writes = 0
      try:
        async for _ in stream:
          num_writes += 1
          if num_writes > written:
            await stuck.wait()
      except asyncio.CancelledError:
        said.append('cut off')
      except errors.CapacityError:
        said.append('told')

    task = asyncio.create_task(read())
    for _ in range(written + 1):
      await asyncio.sleep(0)
      stream.put(delta)
      await asyncio.sleep(0)
      await asyncio.sleep(0)
    for _ in range(3):  # more than may wait
      stream.put(delta)
    await asyncio.sleep(0)
    stuck.set()
    await task
    return said

  assert asyncio.run(run()) == ['cut off' if is_cut_off else 'told']
