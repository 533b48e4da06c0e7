# SPDX-License-Identifier: Apache-2.0
"""Who may join the first process, and what nobody can do to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
import contextlib
import json
from multiprocessing import connection
import os
import pathlib
import socket
import time
from typing import Any

import pytest

from sarathi_jax import config as config_lib
from sarathi_jax import errors
from sarathi_jax.runner import join_key
from sarathi_jax.runner import joining
from sarathi_jax.runner import links

KEY = b'k' * 32
FACTS = {'config.token_budget': 32, "jax's version": '0.10.2'}
TIMEOUT_S = 30.0


@pytest.fixture
def pool() -> Iterator[futures.ThreadPoolExecutor]:
  with futures.ThreadPoolExecutor(8) as made:
    yield made


@pytest.fixture
def address() -> joining.Address:
  return joining.Address('127.0.0.1', joining.free_port())


def gather(
  address: joining.Address,
  count: int = 2,
  *,
  timeout_s: float = TIMEOUT_S,
  said: list[str] | None = None,
) -> dict[int, links.Link]:
  """What the first process does; the others are welcome, then left alone."""
  gathering = joining.Gathering(
    address, count, FACTS, KEY, ([] if said is None else said).append
  )
  ends = gathering.wait(timeout_s)
  for end in ends.values():
    end.send(links.Kind.WELCOME, b'{"port": 7}')
    end.close()
  return ends


def join(
  address: joining.Address,
  process: int = 1,
  *,
  facts: Mapping[str, Any] = FACTS,
  key: bytes = KEY,
  timeout_s: float = TIMEOUT_S,
  said: list[str] | None = None,
) -> Any:
  link, told = joining.join(
    address,
    process,
    facts,
    key,
    timeout_s,
    ([] if said is None else said).append,
  )
  link.close()
  return told


def test_all_join_in_any_order(
  address: joining.Address, pool: futures.ThreadPoolExecutor
) -> None:
  early = [pool.submit(join, address, process) for process in (3, 1)]
  first = pool.submit(gather, address, 4)
  late = pool.submit(join, address, 2)
  assert sorted(first.result(TIMEOUT_S)) == [1, 2, 3]
  assert [f.result(TIMEOUT_S) for f in (*early, late)] == [{'port': 7}] * 3


def test_a_difference_is_named_to_both(
  address: joining.Address, pool: futures.ThreadPoolExecutor
) -> None:
  first = pool.submit(gather, address)
  with pytest.raises(errors.ConfigError) as caught:
    join(address, facts={**FACTS, 'config.token_budget': 64, 'more': 'x'})
  assert str(caught.value) == (
    'process 1 is not to run what process 0 is: config.token_budget is 64 '
    "there, and 32 on process 0; more is 'x' there, and None on process 0."
  )
  with pytest.raises(errors.ConfigError) as too:
    first.result(TIMEOUT_S)
  assert str(too.value) == str(caught.value)


def test_who_is_missing_is_said(
  address: joining.Address,
  pool: futures.ThreadPoolExecutor,
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  monkeypatch.setattr(joining, '_SAY_AFTER_S', 0.0)
  said: list[str] = []
  first = pool.submit(gather, address, 4, timeout_s=1.0, said=said)
  wanted = (
    f'join_timeout_s=1: processes 1 and 3 of 4 did not join process 0 '
    f'at {address}.'
  )
  with pytest.raises(errors.ConfigError) as there:  # and is told the same
    join(address, 2)
  with pytest.raises(errors.ConfigError) as caught:
    first.result(TIMEOUT_S)
  assert str(caught.value) == str(there.value) == wanted
  assert said[0].startswith('Waiting for process')


def test_a_first_process_that_can_not_be_reached_is_an_error_in_time(
  address: joining.Address, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(joining, '_SAY_AFTER_S', 0.0)
  said: list[str] = []
  start = time.monotonic()
  with pytest.raises(errors.ConfigError) as caught:
    join(address, timeout_s=0.5, said=said)
  assert time.monotonic() - start < 10
  assert str(caught.value) == (
    "join_timeout_s=0.5: process 1 can't join process 0 at "
    f"coordinator_address='{address}': Connection refused."
  )
  assert said == [
    f'Process 1 waits for process 0 at {address}: Connection refused.'
  ]


def test_one_that_speaks_something_else_is_an_error_in_time(
  pool: futures.ThreadPoolExecutor,
) -> None:
  with socket.create_server(('127.0.0.1', 0)) as server:

    def talk() -> None:
      with contextlib.suppress(OSError):
        while True:
          end, _ = server.accept()
          end.sendall(b'HTTP/1.1 400 Bad Request\r\n\r\n')
          end.close()

    pool.submit(talk)
    with pytest.raises(errors.ConfigError, match=r'join_timeout_s=0\.3'):
      join(joining.Address(*server.getsockname()), timeout_s=0.3)
    server.shutdown(socket.SHUT_RDWR)


def _closes(end: socket.socket) -> None:
  end.close()


def _resets(end: socket.socket) -> None:
  end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b'\1\0\0\0\0\0\0\0')
  end.close()


def _is_silent(end: socket.socket) -> None:
  del end


def _sends(content: bytes) -> Callable[[socket.socket], None]:
  def send(end: socket.socket) -> None:
    end.sendall(content)

  return send


def _frame(content: bytes) -> bytes:
  return len(content).to_bytes(4) + content


STRANGERS = {
  'closes': _closes,
  'resets': _resets,
  'is silent': _is_silent,
  'sends http': _sends(b'GET / HTTP/1.1\r\n\r\n'),
  'sends zeros': _sends(bytes(100)),
  'sends a huge message': _sends(b'\xff' * 1000),
  'answers nothing': _sends(_frame(b'')),
  'answers wrongly': _sends(_frame(b'x' * 20)),
  'claims to be welcome': _sends(_frame(b'#WELCOME#') * 3),
  'says hello': _sends(_frame(b'\1{"process": 1, "facts": {}}')),
  'sends half a message': _sends(_frame(b'x' * 20)[:7]),
}


@pytest.mark.parametrize('stranger', STRANGERS)
def test_a_stranger_does_not_join_and_disturbs_nobody(
  stranger: str, address: joining.Address, pool: futures.ThreadPoolExecutor
) -> None:
  first = pool.submit(gather, address)
  strangers = []
  for _ in range(5):
    while True:
      try:
        strangers.append(socket.create_connection(address))
        break
      except ConnectionRefusedError:
        time.sleep(0.01)
    with contextlib.suppress(OSError):
      STRANGERS[stranger](strangers[-1])
  assert not first.done()
  assert join(address) == {'port': 7}
  assert list(first.result(TIMEOUT_S)) == [1]
  for end in strangers:
    end.close()


def test_more_strangers_than_there_is_room_for_keep_nobody_out(
  address: joining.Address,
  pool: futures.ThreadPoolExecutor,
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  """Those that say nothing are sent away; who has the key tries again."""
  monkeypatch.setattr(joining, '_MAX_HANDSHAKES', 3)
  monkeypatch.setattr(joining, '_HANDSHAKE_S', 0.5)
  first = pool.submit(gather, address)
  with contextlib.ExitStack() as stack:
    for _ in range(20):
      while True:
        try:
          stack.enter_context(socket.create_connection(address))
          break
        except ConnectionRefusedError:
          time.sleep(0.01)
    assert join(address) == {'port': 7}
  assert list(first.result(TIMEOUT_S)) == [1]


def test_another_key_is_told_on_both_sides(
  address: joining.Address, pool: futures.ThreadPoolExecutor
) -> None:
  said: list[str] = []
  first = pool.submit(gather, address, said=said)
  with pytest.raises(errors.ConfigError, match=r'key_file: .* another key'):
    join(address, key=b'another key of all')
  assert join(address) == {'port': 7}
  first.result(TIMEOUT_S)
  assert said == [
    'Refused a connection from 127.0.0.1: it does not have the '
    'key of --join_key_file.'
  ]


@pytest.mark.parametrize('process', [0, 1, 2, -1])
def test_a_number_that_is_taken_or_unknown_is_refused(
  process: int, address: joining.Address, pool: futures.ThreadPoolExecutor
) -> None:
  first = pool.submit(gather, address, 3)
  one = pool.submit(join, address, 1)
  if process == 2:
    assert join(address, 2) == {'port': 7}
  else:
    time.sleep(0.5)  # for the other one to be first
    with pytest.raises(errors.ConfigError, match=f'process_id={process}'):
      join(address, process)
    join(address, 2)
  assert one.result(TIMEOUT_S) == {'port': 7}
  assert sorted(first.result(TIMEOUT_S)) == [1, 2]


def test_one_that_left_before_all_were_there_may_come_again(
  address: joining.Address, pool: futures.ThreadPoolExecutor
) -> None:
  said: list[str] = []
  first = pool.submit(gather, address, 3, said=said)
  joining.wait_until_open(address, TIMEOUT_S)
  link = links.Link(socket.create_connection(address))
  connection.answer_challenge(link, KEY)
  connection.deliver_challenge(link, KEY)
  link.send(
    links.Kind.HELLO, json.dumps({'process': 1, 'facts': FACTS}).encode()
  )
  link.close()
  while not said:
    assert not first.done()
    time.sleep(0.01)
  assert said == ['Process 1 left before all had joined.']
  again = pool.submit(join, address, 1)
  assert join(address, 2) == again.result(TIMEOUT_S)
  assert sorted(first.result(TIMEOUT_S)) == [1, 2]


def test_one_that_comes_too_late_is_told_and_changes_nothing(
  address: joining.Address, pool: futures.ThreadPoolExecutor
) -> None:
  gathering = joining.Gathering(address, 3, FACTS, KEY, lambda line: None)
  with pytest.raises(errors.ConfigError, match='processes 1 and 2 of 3'):
    gathering.wait(0.0)
  with socket.create_server(('127.0.0.1', 0)) as server:
    end = socket.create_connection(server.getsockname())
    gathering._add(1, FACTS, links.Link(server.accept()[0]))
    link = links.Link(end)
    link.limit(5.0)
    assert link.receive() == (
      links.Kind.FAULT,
      b'process 0 waits for nobody any more.',
    )
    link.close()
  assert not gathering._links


def test_an_address_in_use_is_an_error(address: joining.Address) -> None:
  with (
    socket.create_server(address),
    pytest.raises(errors.ConfigError, match="can't listen there: Addr"),
  ):
    gather(address)


@pytest.mark.parametrize(
  'text', ['host', 'host:', ':1', 'h:0', 'h:70000', 'h:x', '']
)
def test_an_address_that_is_none(text: str) -> None:
  with pytest.raises(errors.ConfigError, match='must be HOST:PORT'):
    joining.parse_address(text)


def test_addresses() -> None:
  assert joining.parse_address('[::1]:8476') == joining.Address('::1', 8476)
  assert str(joining.parse_address('[::1]:8476')) == '[::1]:8476'
  assert joining.parse_address('localhost:1').is_loopback
  assert not joining.parse_address('10.0.0.1:1').is_loopback


def test_a_key_is_made_once_for_one_user(
  tmp_path: pathlib.Path,
  pool: futures.ThreadPoolExecutor,
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  monkeypatch.setattr(
    config_lib, 'default_cache_dir', lambda: tmp_path / 'cache'
  )
  keys = {f.result() for f in [pool.submit(join_key.read) for _ in range(8)]}
  assert len(keys) == 1 and len(keys.pop()) == 64
  assert os.listdir(tmp_path / 'cache') == ['join_key']
  assert (tmp_path / 'cache' / 'join_key').stat().st_mode & 0o777 == 0o600


def test_a_key_that_is_none(tmp_path: pathlib.Path) -> None:
  (tmp_path / 'short').write_text('secret\n')
  with pytest.raises(errors.ConfigError, match='at least 16 bytes'):
    join_key.read(tmp_path / 'short')
  with pytest.raises(errors.ConfigError, match='No such file'):
    join_key.read(tmp_path / 'none')
