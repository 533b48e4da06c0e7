# SPDX-License-Identifier: Apache-2.0
"""SubscribeKvEvents and FlushCache of VllmEngine, to a router that believes."""

from __future__ import annotations

import array
import pathlib
import random
from typing import Any

import grpc
import pytest
from smg_grpc_proto import vllm_engine_pb2 as pb
from smg_grpc_proto.generated import common_pb2

from sarathi_jax.scheduler import page_log
from sarathi_jax.server import config as config_lib
from sarathi_jax.server import sarathi_pb2
from sarathi_jax.server import sarathi_pb2_grpc
from sarathi_jax.server.guard import limits as limits_lib
from tests.server import fake
from tests.server import kv_router

PAGE = kv_router.PAGE
PROMPT = list(range(1, 12))  # two full pages, and a part of one
_CODE = grpc.StatusCode


def test_a_router_knows_what_each_prompt_will_find() -> None:
  """Of chats with turns, in a cache that has room for few."""
  rng = random.Random(0)
  chats = [[1] * 6, [1] * 4 + [2] * 5, [3] * 3]
  num_hits = 0
  with (
    kv_router.serving(dict(num_pages=12, max_model_len=40)) as running,
    kv_router.following(running) as early,
  ):
    for turn in range(60):
      chat = rng.randrange(3)
      expected = early.catch_up().num_found(chats[chat])
      num_hits += expected > 0
      found = kv_router.generate(running, chats[chat], rng.randint(1, 9))
      # What is found within a page is told of no more than that page.
      assert expected <= found < expected + 4
      chats[chat] = [*chats[chat], *rng.choices(range(8), k=rng.randint(1, 6))]
      if len(chats[chat]) > 30:
        chats[chat] = chats[chat][: rng.randint(1, 12)]
      if turn == 40:
        assert kv_router.flush(running).success
        assert not early.catch_up().pages
      if turn == 45:
        control: Any = sarathi_pb2_grpc.ControlStub(running.channel)
        control.ResetCache(sarathi_pb2.ResetCacheRequest())
    with kv_router.following(running) as late:  # From a snapshot alone.
      assert late.catch_up().pages == early.catch_up().pages != {}
  assert num_hits > 20 and {*early.router.seen} == {
    'stored',
    'removed',
    'cleared',
  }


def test_what_was_there_comes_first_and_what_comes_follows() -> None:
  limits = limits_lib.Limits(max_kv_history=4)
  with kv_router.serving(limits=limits) as running:
    kv_router.generate(running, PROMPT)
    with kv_router.following(running) as first:
      assert first.catch_up().beginnings() == {
        tuple(PROMPT[:4]),
        tuple(PROMPT[:8]),
      }
      seen = first.router.last
      kv_router.generate(running, [9] * 9)
      assert tuple([9] * 8) in first.catch_up().beginnings()
      # Who knows of the first part goes on after it.
      with kv_router.following(running, seen) as second:
        assert second.catch_up().beginnings() == {(9,) * 4, (9,) * 8}
      # More than is kept, with the one before.
      kv_router.generate(running, [8] * 12)
      first.catch_up()
      for start in (1, seen, first.router.last + 1):
        code, words = kv_router.end_of(kv_router.subscribe(running, start))
        assert code is _CODE.OUT_OF_RANGE and 'start_sequence_number' in words
      with kv_router.following(running, first.router.last) as third:
        kv_router.generate(running, [7] * 5)
        assert third.catch_up().beginnings() == {(7,) * 4}


def test_loads_tell_how_much_is_found() -> None:
  with kv_router.serving() as running:
    for expected in (0, 10 / 22):
      kv_router.generate(running, PROMPT)
      (load,) = kv_router.stub_of(running).GetLoads(pb.GetLoadsRequest()).loads
      assert load.cache_hit_rate == pytest.approx(expected)


def test_a_router_is_told_of_the_load_as_it_changes() -> None:
  runners: list[fake.GatedRunner] = []

  def make(*args: Any) -> fake.GatedRunner:
    runners.append(fake.GatedRunner(*args))
    return runners[0]

  with (
    kv_router.serving(dict(runner=make, max_num_seqs=1)) as running,
    kv_router.following(running) as follower,
  ):
    calls = [
      running.generate(token_ids=PROMPT, sampling={'max_tokens': 1})
      for _ in range(3)
    ]
    running.wait_until_open(3)

    def load_is(num_running: int, num_waiting: int) -> bool:
      load = follower.router.load
      return (load.running_requests, load.waiting_requests) == (
        num_running,
        num_waiting,
      )

    runners[0].let(1)
    fake.wait_until(lambda: load_is(1, 1) or load_is(1, 2))
    assert follower.router.load.max_running_requests == 1
    runners[0].open()
    for call in calls:
      list(call)
    fake.wait_until(lambda: load_is(0, 0))
    load = follower.router.load
    (asked,) = kv_router.stub_of(running).GetLoads(pb.GetLoadsRequest()).loads
    assert load.cache_hit_rate == asked.cache_hit_rate == 20 / 33
    assert load.token_usage == asked.token_usage
    assert load.max_total_num_tokens == asked.max_total_num_tokens > 0
    seen = load.sample  # It tells so much although nothing happens.
    fake.wait_until(lambda: follower.router.load.sample > seen)


def test_who_reads_an_end_goes_on_from_pages_that_are_told() -> None:
  with kv_router.serving() as running, kv_router.following(running) as follower:
    journal = running.server._journal
    assert journal is not None
    follower.catch_up()
    for first in range(20):
      kv_router.generate(running, [first] * (PAGE - 1), max_tokens=2)
      assert len(journal._view.pages()) == first + 1


def test_a_large_cache_comes_in_parts() -> None:
  with kv_router.serving(dict(num_pages=2**12, max_model_len=2**13)) as running:
    for first in range(3):
      kv_router.generate(running, [first] + [1, 2, 3] * 600)
    call = kv_router.subscribe(running)
    router = kv_router.Router()
    parts = [next(call)]
    parts += [next(call) for _ in range(parts[0].snapshot.count - 1)]
    for message in parts:
      router.apply(message)
    assert len(parts) > 8
    assert [message.snapshot.index for message in parts] == [*range(len(parts))]
    assert (
      {message.snapshot.blocks for message in parts}
      == {len(router.pages)}
      == {3 * 450}
    )
    kv_router.generate(running, [5] * 5)
    router.apply(next(call))  # Numbered behind the last part.
    assert (5,) * 4 in router.beginnings()
    call.cancel()


def test_who_reads_too_slowly_is_ended_and_holds_up_nobody() -> None:
  limits = limits_lib.Limits(max_kv_history=1000)
  size = 1024
  engine = dict(page_size=size, num_pages=4, max_model_len=2 * size)
  with (
    kv_router.serving(engine, limits=limits) as running,
    kv_router.following(running) as other,
  ):
    journal = running.server._journal
    assert journal is not None
    slow = kv_router.subscribe(running)
    next(slow)
    other.catch_up()
    tokens = array.array('i', [2**30] * size).tobytes()  # 5 KiB of a message

    load = running.engine.load()

    async def come_and_go(first: int) -> None:
      pages = [
        page_log.Stored(i.to_bytes(8, 'big') * 4, None, tokens, '')
        for i in range(first, first + 100)
      ]
      journal.add(
        [*pages, *(page_log.Removed(page.key) for page in pages)], load
      )

    for first in range(1, 4001, 100):  # 20 MiB
      running.run(come_and_go(first))
      other.catch_up()
    assert journal._num_kept <= 1000
    code, words = kv_router.end_of(slow)
    assert code is _CODE.DATA_LOSS and 'max_kv_history=1000' in words
    assert not other.router.pages
    kv_router.generate(running, [1] * (size + 1))
    assert len(other.catch_up().pages) == 1


def test_a_failed_step_clears_all() -> None:
  runners: list[fake.GatedRunner] = []

  def make(*args: Any) -> fake.GatedRunner:
    runners.append(fake.GatedRunner(*args))
    runners[0].open()
    return runners[0]

  with (
    kv_router.serving(dict(runner=make)) as running,
    kv_router.following(running) as follower,
  ):
    kv_router.generate(running, PROMPT)
    assert follower.catch_up().pages
    runners[0].fault = RuntimeError('made up')
    with pytest.raises(grpc.RpcError):
      kv_router.generate(running, [5] * 5)
    assert not follower.catch_up().pages
    assert kv_router.generate(running, PROMPT) == 0
    assert len(follower.catch_up().pages) == 2


def test_salted_pages_are_told_to_nobody_without_tokens() -> None:
  with kv_router.serving() as running, kv_router.following(running) as follower:
    for salt in ('mine', ''):
      list(
        running.generate(
          token_ids=PROMPT, sampling={'max_tokens': 1}, cache_salt=salt
        )
      )
      assert len(follower.catch_up().pages) == (0 if salt else 2)
    assert kv_router.flush(running).success and not follower.catch_up().pages


def test_with_tokens_administrators_are_told_of_all(
  tmp_path: pathlib.Path,
) -> None:
  tokens = tmp_path / 'tokens'
  tokens.write_text('ann ann-secret\nops ops-secret admin\n')
  with kv_router.serving(auth_tokens=tokens, host='127.0.0.1') as running:
    assert (
      kv_router.end_of(kv_router.subscribe(running))[0] is _CODE.UNAUTHENTICATED
    )
    code, words = kv_router.end_of(
      kv_router.subscribe(running, token='ann-secret')
    )
    assert code is _CODE.PERMISSION_DENIED and 'SubscribeKvEvents' in words
    with pytest.raises(grpc.RpcError) as caught:
      kv_router.flush(
        running, metadata=[('authorization', 'Bearer ann-secret')]
      )
    assert caught.value.code() is _CODE.PERMISSION_DENIED
    assert 'FlushCache' in caught.value.details()
    with kv_router.following(running, 0, 'ops-secret') as follower:
      for salt in ('', 'mine'):
        list(
          running.stub.Generate(
            sarathi_pb2.GenerateRequest(
              token_ids=sarathi_pb2.TokenIds(ids=PROMPT),
              sampling=sarathi_pb2.SamplingParams(max_tokens=1),
              cache_salt=salt,
            ),
            metadata=[('authorization', 'Bearer ann-secret')],
          )
        )
      fake.wait_until(lambda: len(follower.router.pages) == 4)
      for salt in ('ann ', 'ann mine'):
        assert len(follower.router.beginnings(salt)) == 2
      assert kv_router.flush(
        running, metadata=[('authorization', 'Bearer ops-secret')]
      ).success


@pytest.mark.parametrize(
  'fields, served',
  [
    ({}, True),
    ({'host': '0.0.0.0'}, False),
    ({'host': '0.0.0.0', 'auth_tokens': pathlib.Path('x')}, True),
    ({'host': '0.0.0.0', 'kv_events': True}, True),
    ({'kv_events': False}, False),
    ({'host': '0.0.0.0', 'control': True}, False),
  ],
)
def test_strangers_are_told_nothing(
  fields: dict[str, Any], served: bool
) -> None:
  assert config_lib.ServerConfig(**fields).serves_kv_events is served


def test_what_is_not_served_is_unimplemented() -> None:
  """So that smg asks no more, and goes by what it routed itself."""
  with kv_router.serving(kv_events=False, control=False) as running:
    code, words = kv_router.end_of(kv_router.subscribe(running))
    assert code is _CODE.UNIMPLEMENTED and '--kv_events' in words
    with pytest.raises(grpc.RpcError) as caught:
      kv_router.flush(running)
    assert caught.value.code() is _CODE.UNIMPLEMENTED
    assert '--control' in caught.value.details()
    assert running.engine.page_log is None
  with kv_router.serving(dict(prefix_cache=False)) as running:
    code, words = kv_router.end_of(kv_router.subscribe(running))
    assert code is _CODE.UNIMPLEMENTED and 'prefix_cache' in words


def test_so_many_may_follow() -> None:
  limits = limits_lib.Limits(max_kv_subscribers=2)
  with kv_router.serving(limits=limits) as running:
    calls = [kv_router.subscribe(running) for _ in range(2)]
    for call in calls:
      next(call)
    code, words = kv_router.end_of(kv_router.subscribe(running))
    assert code is _CODE.RESOURCE_EXHAUSTED and 'max_kv_subscribers=2' in words
    calls[0].cancel()
    journal = running.server._journal
    assert journal is not None
    fake.wait_until(lambda: journal._num_followers == 1)
    next(kv_router.subscribe(running))


def test_who_follows_does_not_hold_up_the_end() -> None:
  with kv_router.serving() as running:
    call = kv_router.subscribe(running)
    next(call)
    running.run(running.server.drain())
    running.run(running.server.stop())
    assert kv_router.end_of(call)[0] is _CODE.UNAVAILABLE


def test_a_flush_waits_until_nothing_runs() -> None:
  runners: list[fake.GatedRunner] = []

  def make(*args: Any) -> fake.GatedRunner:
    runners.append(fake.GatedRunner(*args))
    return runners[0]

  with kv_router.serving(dict(runner=make)) as running:
    call = running.generate(token_ids=PROMPT, sampling={'max_tokens': 30})
    runners[0].let(2)
    next(call)
    whole = kv_router.stub_of(running).FlushCache.future(
      common_pb2.FlushCacheRequest()
    )
    fake.step_until_done(whole, runners[0])
    assert not whole.result().success and 'run' in whole.result().message
    whole = kv_router.stub_of(running).FlushCache.future(
      common_pb2.FlushCacheRequest(timeout_s=fake.TIMEOUT_S)
    )
    runners[0].open()
    list(call)
    assert whole.result().success
    assert kv_router.generate(running, PROMPT) == 0
    assert kv_router.generate(running, PROMPT) == 10


@pytest.mark.parametrize('timeout_s', [-1.0, float('nan'), float('inf')])
def test_a_bad_timeout_is_refused(timeout_s: float) -> None:
  with kv_router.serving() as running, pytest.raises(grpc.RpcError) as caught:
    kv_router.flush(running, timeout_s)
  assert caught.value.code() is _CODE.INVALID_ARGUMENT
  assert 'timeout_s' in caught.value.details()
