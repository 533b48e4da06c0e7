# SPDX-License-Identifier: Apache-2.0
"""Processes end together: here they are threads, with real connections."""

from __future__ import annotations

from collections.abc import Iterator
import queue
import socket
import threading

import numpy as np
import pytest

from sarathi_jax import errors
from sarathi_jax.runner import ends
from sarathi_jax.runner import follower as follower_lib
from sarathi_jax.runner import leader as leader_lib
from sarathi_jax.runner import links

TIMEOUT_S = 30.0
FACTS = {"the weights' hash": 'abc'}


class Hosts:
  """A leader and two followers, which note down how they would exit."""

  def __init__(self) -> None:
    self.exits: list[queue.SimpleQueue[tuple[int, str]]] = [
      queue.SimpleQueue() for _ in range(3)
    ]
    self.pairs = {i: self._pair() for i in (1, 2)}
    self.leader = leader_lib.Leader(
      {i: links.Link(pair[0]) for i, pair in self.pairs.items()}, self._exit(0)
    )
    self.followers = {
      i: follower_lib.Follower(links.Link(pair[1]), 3, self._exit(i))
      for i, pair in self.pairs.items()
    }

  @staticmethod
  def _pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(('127.0.0.1', 0)) as server:
      end = socket.create_connection(server.getsockname())
      return server.accept()[0], end

  def _exit(self, i: int) -> ends.Exit:
    def exit_with(code: int, message: str) -> None:
      self.exits[i].put((code, message))
      self.vanish(i)  # as a process that ends

    return exit_with

  def vanish(self, i: int) -> None:
    for pair in [self.pairs[i]] if i else self.pairs.values():
      end = pair[1 if i else 0]
      try:
        end.shutdown(socket.SHUT_RDWR)
      except OSError:
        continue

  def exit_of(self, i: int) -> tuple[int, str]:
    return self.exits[i].get(timeout=TIMEOUT_S)

  def close(self) -> None:
    for i in range(3):
      self.vanish(i)
    for pair in self.pairs.values():
      for end in pair:
        end.close()


def leave(end: ends.End, error: BaseException) -> None:
  """The end of a `with` block, which does not end this process here."""
  end.__exit__(type(error), error, None)


@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hosts]:
  monkeypatch.setattr(ends, 'CAUSE_S', 0.1)
  made = Hosts()
  yield made
  made.close()


def test_steps_arrive_in_order_and_all_end_well(hosts: Hosts) -> None:
  for size in (4, 8):
    hosts.leader.send(size, np.arange(6, dtype=np.int32))
  idle: list[bool] = []
  for i in (1, 2):
    steps = hosts.followers[i].steps(lambda: idle.append(True))
    for size in (4, 8):
      got, buffers = next(steps)
      assert got == size and buffers.tolist() == [0, 1, 2, 3, 4, 5]
  with hosts.leader:
    pass
  assert [hosts.exit_of(i) for i in range(3)] == [(0, '')] * 3


def test_all_agree_and_are_warm_before_it_goes_on(hosts: Hosts) -> None:
  done: queue.SimpleQueue[str] = queue.SimpleQueue()

  def follow(i: int) -> None:
    hosts.followers[i].agree(FACTS)
    done.put(f'{i} agrees')

  def lead() -> None:
    hosts.leader.agree(FACTS)
    hosts.leader.wait_until_warm()
    done.put('all are warm')

  threads = [threading.Thread(target=follow, args=(i,)) for i in (1, 2)]
  threads.append(threading.Thread(target=lead))
  for thread in threads:
    thread.start()
  assert {done.get(timeout=TIMEOUT_S) for _ in range(2)} == {
    '1 agrees',
    '2 agrees',
  }
  hosts.followers[2].tell_warm()
  threads[-1].join(0.2)
  assert done.empty()  # One of them still compiles.
  hosts.followers[1].tell_warm()
  assert done.get(timeout=TIMEOUT_S) == 'all are warm'
  for thread in threads:
    thread.join()


def test_a_difference_ends_all_with_its_name(hosts: Hosts) -> None:
  threads = [
    threading.Thread(
      target=hosts.followers[i].agree, args=({**FACTS, 'x': i},), daemon=True
    )
    for i in (1, 2)
  ]
  for thread in threads:
    thread.start()
  with pytest.raises(errors.ConfigError) as caught:
    hosts.leader.agree({**FACTS, 'x': 1})
  leave(hosts.leader, caught.value)
  wanted = (
    'process 2 is not to run what process 0 is: x is 2 there, and 1 on '
    'process 0.'
  )
  assert hosts.exit_of(0) == (1, f'error: {wanted}')
  for i in (1, 2):
    assert hosts.exit_of(i) == (1, f'error: process 0 failed: {wanted}')


@pytest.mark.parametrize(
  'fault, line',
  [
    (
      RuntimeError('the GPU is on fire\nand more'),
      'RuntimeError: the GPU is on fire',
    ),
    (errors.ConfigError('num_pages=1: too few.'), 'num_pages=1: too few.'),
  ],
)
@pytest.mark.parametrize('who', [0, 1])
def test_an_exception_anywhere_ends_all_with_its_words(
  hosts: Hosts, who: int, fault: Exception, line: str
) -> None:
  leave(hosts.followers[1] if who else hosts.leader, fault)
  assert hosts.exit_of(who) == (1, f'error: {line}')
  for i in {0, 1, 2} - {who}:
    assert hosts.exit_of(i) == (1, f'error: process {who} failed: {line}')


def test_a_process_that_vanishes_is_named_by_all(hosts: Hosts) -> None:
  hosts.vanish(2)
  line = (
    'error: process 2 of 3 is gone; nothing can be computed without its '
    'devices.'
  )
  assert hosts.exit_of(0) == hosts.exit_of(1) == (1, line)


def test_a_first_process_that_vanishes_is_named_by_all(hosts: Hosts) -> None:
  hosts.leader._end()  # The dead say nothing.
  hosts.vanish(0)
  line = (
    'error: process 0 of 3 is gone; nothing can be computed without its '
    'devices.'
  )
  assert hosts.exit_of(1) == hosts.exit_of(2) == (1, line)


def test_the_cause_is_told_and_not_what_followed_from_it(hosts: Hosts) -> None:
  """A step fails, as another process is gone, which is known a bit later."""
  told: queue.SimpleQueue[Exception] = queue.SimpleQueue()
  hosts.leader.on_fault = told.put
  ends.CAUSE_S = TIMEOUT_S  # the fixture sets it back
  hosts.leader.fail_later(RuntimeError('gloo: connection closed'))
  hosts.vanish(1)
  assert 'process 1 of 3 is gone' in str(told.get(timeout=TIMEOUT_S))
  leave(hosts.leader, RuntimeError('gloo: connection closed'))
  assert hosts.exit_of(0)[1].startswith('error: process 1 of 3 is gone')


def test_a_step_that_fails_with_all_there_ends_all(hosts: Hosts) -> None:
  hosts.leader.fail_later(RuntimeError('out of memory'))
  line = 'error: process 0 failed: RuntimeError: out of memory'
  assert [hosts.exit_of(i) for i in range(3)] == [(1, line)] * 3


def test_a_lost_process_wakes_who_waits_for_it(hosts: Hosts) -> None:
  hosts.leader.on_fault = lambda error: None
  told: queue.SimpleQueue[str] = queue.SimpleQueue()

  def wait() -> None:
    try:
      hosts.leader.wait_until_warm()
    except errors.EngineDeadError as error:
      told.put(str(error))

  threading.Thread(target=wait, daemon=True).start()
  hosts.vanish(1)
  assert 'process 1 of 3 is gone' in told.get(timeout=TIMEOUT_S)


def test_one_that_is_told_to_end_has_all_end(hosts: Hosts) -> None:
  leaving: queue.SimpleQueue[int] = queue.SimpleQueue()
  hosts.leader.on_leaving = leaving.put
  hosts.followers[2].end_at(15)
  assert leaving.get(timeout=TIMEOUT_S) == 2
  assert hosts.exits[2].empty()  # It still computes what is under way.
  with hosts.leader:
    pass
  assert [hosts.exit_of(i) for i in range(3)] == [(0, '')] * 3


def test_one_that_is_told_twice_ends_at_once(hosts: Hosts) -> None:
  hosts.leader.on_leaving = lambda process: None
  for _ in range(2):
    hosts.followers[2].end_at(15)
  assert hosts.exit_of(2) == (128 + 15, '')


def test_a_code_goes_to_all(hosts: Hosts) -> None:
  leave(hosts.leader, SystemExit(143))
  assert hosts.exit_of(0) == (143, '')
  line = 'error: process 0 ended with code 143.'
  assert hosts.exit_of(1) == hosts.exit_of(2) == (143, line)


def test_one_that_takes_nothing_holds_nobody_up(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  """It is stopped, say; the others are to hear of the end."""
  monkeypatch.setattr(links, '_SEND_S', 1, raising=False)
  stopped, end = Hosts._pair()
  link = links.Link(stopped)

  def send() -> None:
    with pytest.raises(OSError):
      link.send(links.Kind.STEP, bytes(1 << 26))

  sending = threading.Thread(target=send, daemon=True)
  sending.start()
  sending.join(5.0)
  assert not sending.is_alive()
  link.close()
  end.close()


def test_what_is_no_message_is_as_good_as_gone(hosts: Hosts) -> None:
  hosts.pairs[1][1].sendall(b'\0\0\0\1\xff')
  assert hosts.exit_of(0)[1].startswith('error: process 1 of 3 is gone')
