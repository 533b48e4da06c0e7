# SPDX-License-Identifier: Apache-2.0
"""Requests of HTTP that are sent before the one before them is answered."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import json
import socket
from typing import Any

import pytest

from sarathi_jax.server.guard import limits as limits_lib
from tests.server import fake
from tests.server.http_client import PROMPT

_MOST = 3
_HEALTH = b'GET /health HTTP/1.1\r\n\r\n'
_BODY = json.dumps(PROMPT).encode()
_POST = (
  b'POST /v1/completions HTTP/1.1\r\ncontent-length: %d\r\n\r\n' % len(_BODY)
) + _BODY


@pytest.fixture
def held(stepped: Callable[..., Any]) -> Iterator[tuple[Any, Any, Any]]:
  """(server, runner, connection): the runner's steps wait."""
  running, runner, client = stepped(
    config={'limits': limits_lib.Limits(max_pipelined=_MOST, max_message_mib=1)}
  )
  with socket.create_connection(('127.0.0.1', client.port)) as connection:
    connection.settimeout(fake.TIMEOUT_S)
    yield running, runner, connection
  runner.open()
  assert client.serves()


def _statuses(connection: socket.socket) -> list[bytes]:
  """Those of all answers, until the server closes."""
  data = b''
  while more := connection.recv(1 << 16):
    data += more
  heads = data.split(b'HTTP/1.1 ')
  assert not heads[0]
  return [head[:3] for head in heads[1:]]


def _send(held: tuple[Any, Any, Any], first: bytes, then: bytes) -> Any:
  """Sends what comes while the engine has the first request; its connection."""
  running, runner, connection = held
  connection.sendall(first)
  fake.wait_until(lambda: running.server.frontend.num_open == 1)
  connection.sendall(then)
  runner.open()
  return connection


def test_many_are_not_taken(held: tuple[Any, Any, Any]) -> None:
  """Each looked at all before it: 256 KiB of them held the loop for 2 s."""
  connection = _send(held, _POST, 1000 * _HEALTH)
  assert _statuses(connection) == [b'200'] * (1 + _MOST)


def test_a_few_are_answered_in_their_order(held: tuple[Any, Any, Any]) -> None:
  last = b'GET /nowhere HTTP/1.1\r\nconnection: close\r\n\r\n'
  connection = _send(held, _POST, (_MOST - 1) * _HEALTH + last)
  assert _statuses(connection) == [b'200'] * _MOST + [b'404']


@pytest.mark.parametrize(
  'then',
  [
    b'nonsense\r\n\r\n',
    b'GET /' + b'x' * 100_000,
    b'GET / HTTP/1.1\r\n' + b'a: b\r\n' * 200,
    _HEALTH + b'nonsense\r\n\r\n',
  ],
)
def test_nothing_is_answered_in_the_middle(
  held: tuple[Any, Any, Any], then: bytes
) -> None:
  """What can't be read ends a connection when the others are answered."""
  connection = _send(held, _POST, then)
  assert _statuses(connection) == [b'200'] * (1 + then.count(_HEALTH))


def test_a_body_that_breaks_off_ends_all(held: tuple[Any, Any, Any]) -> None:
  chunked = b'POST /v1/completions HTTP/1.1\r\ntransfer-encoding: chunked'
  connection = _send(held, _POST, chunked + b'\r\n\r\n1\r\nx\r\nnonsense')
  with contextlib.suppress(ConnectionError):
    assert _statuses(connection) == []


def test_what_is_not_taken_is_not_read_for_ever(
  held: tuple[Any, Any, Any],
) -> None:
  _, _, connection = held
  with pytest.raises(ConnectionError):
    connection.sendall(_POST + 200_000 * _HEALTH)
    _statuses(connection)
