# SPDX-License-Identifier: Apache-2.0
"""Joins the processes that compute one model. No JAX.

The first process listens until all others have joined. Both sides of a
connection prove that they have the key that all of them share (`join_key`).
Then the other process says which one it is, and what it is about to run.
Nothing that a stranger sends, or fails to send, holds up the others.

  challenge, answer, both ways    by multiprocessing.connection, HMAC
  HELLO   -> first                JSON {'process': 1, 'facts': {...}}
  WELCOME <- first                once all are there; or FAULT
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
import contextlib
import json
from multiprocessing import AuthenticationError
from multiprocessing import connection
import socket
import threading
import time
from typing import Any, NamedTuple

from sarathi_jax import config as config_lib
from sarathi_jax import errors
from sarathi_jax.runner import links as links_lib

Facts = Mapping[str, Any]  # name -> what JSON can hold, the same on all
Say = Callable[[str], None]
Kind = links_lib.Kind
Link = links_lib.Link

_HANDSHAKE_S = 5.0  # to prove the key, and say hello
_MAX_HANDSHAKES = 64  # at once; further connections are closed
_POLL_S = 0.2
_SAY_AFTER_S, _SAY_EVERY_S = 5.0, 30.0  # when to say who is waited for
_MAX_NAMED = 8  # differences that a message names


class Address(NamedTuple):
  """The address at which the first process listens."""

  host: str
  port: int

  @property
  def is_loopback(self) -> bool:
    """Whether it can only mean this machine."""
    return (
      self.host == 'localhost'
      or self.host.startswith('127.')
      or (self.host == '::1')
    )

  def __str__(self) -> str:
    host = f'[{self.host}]' if ':' in self.host else self.host
    return f'{host}:{self.port}'


def parse_address(text: str) -> Address:
  """Parses HOST:PORT or [HOST]:PORT; raises ConfigError for anything else."""
  host, _, port = text.rpartition(':')
  host = host.removeprefix('[').removesuffix(']')
  config_lib.check(
    bool(host) and port.isascii() and port.isdigit() and 0 < int(port) < 2**16,
    'coordinator_address',
    text,
    'must be HOST:PORT',
  )
  return Address(host, int(port))


def misfit(process: int, theirs: Facts, ours: Facts) -> str | None:
  """Says how a process's facts differ from the first one's; None if equal."""
  ours = json.loads(json.dumps(dict(ours)))
  names = [
    name
    for name in {**ours, **theirs}
    if name not in ours or name not in theirs or ours[name] != theirs[name]
  ]
  if not names:
    return None
  told = '; '.join(
    f'{name} is {theirs.get(name)!r} there, and {ours.get(name)!r} on process 0'
    for name in names[:_MAX_NAMED]
  )
  more = len(names) - _MAX_NAMED
  return (
    f'process {process} is not to run what process 0 is: {told}'
    + (f'; and {more} more' if more > 0 else '')
    + '.'
  )


class Gathering:
  """Has the first process wait for all others.

  Args:
    address: where the others connect to.
    count: the number of all processes.
    facts: what must be the same on all.
    key: of `join_key.read`.
    say: called with a line about who is waited for, or who was refused.

  Raises:
    ConfigError: this process can't listen there.
  """

  def __init__(
    self, address: Address, count: int, facts: Facts, key: bytes, say: Say
  ) -> None:
    self._address = address
    self._count = count
    self._facts = facts
    self._key = key
    self._say = say
    self._links: dict[int, Link] = {}
    self._misfit: str | None = None
    self._changed = threading.Condition()
    self._slots = threading.BoundedSemaphore(_MAX_HANDSHAKES)
    self._is_open = True
    self._refused: set[str] = set()  # hosts
    try:
      self._listener = _listen(address)
    except OSError as error:
      raise errors.ConfigError(
        f"coordinator_address={str(address)!r}: process 0 can't listen "
        f'there: {error.strerror or error}.'
      ) from error

  def wait(self, timeout_s: float) -> dict[int, Link]:
    """Waits for all others; returns the connections, by process.

    Raises:
      ConfigError: some did not come in time, or are to run something else.
        Those that are there are told.
    """
    thread = threading.Thread(target=self._accept, name='joining', daemon=True)
    thread.start()
    try:
      problem = self._wait(timeout_s)
    finally:
      with self._changed:  # From now on `_add` leaves the links alone.
        self._is_open = False
      thread.join()
      self._listener.close()
    if problem is None:
      return self._links
    for link in self._links.values():
      with contextlib.suppress(OSError):
        link.send(Kind.FAULT, problem.encode())
      link.close()
    raise errors.ConfigError(problem)

  def _wait(self, timeout_s: float) -> str | None:
    begin = time.monotonic()
    next_word = begin + _SAY_AFTER_S
    with self._changed:
      while self._misfit is None and (missing := self._missing()):
        now = time.monotonic()
        if now - begin >= timeout_s:
          return (
            f'join_timeout_s={timeout_s:g}: {_named(missing)} of '
            f'{self._count} did not join process 0 at {self._address}.'
          )
        if now >= next_word:
          next_word = now + _SAY_EVERY_S
          self._say(
            f'Waiting for {_named(missing)} of {self._count} to join '
            f'at {self._address}, for {timeout_s - now + begin:.0f} s '
            'at most.'
          )
        self._changed.wait(min(_POLL_S, timeout_s))
      return self._misfit

  def _missing(self) -> list[int]:
    for process, link in list(self._links.items()):
      if link.is_gone:
        self._say(f'Process {process} left before all had joined.')
        self._links.pop(process).close()
    return [i for i in range(1, self._count) if i not in self._links]

  def _accept(self) -> None:
    self._listener.settimeout(_POLL_S)
    while self._is_open:
      try:
        end, peer = self._listener.accept()
      except TimeoutError:
        continue
      except OSError:  # No file left, or it is gone: others may still come.
        time.sleep(_POLL_S)
        continue
      if self._slots.acquire(blocking=False):
        threading.Thread(
          target=self._admit,
          args=(end, str(peer[0])),
          name='joining',
          daemon=True,
        ).start()
      else:
        end.close()

  def _admit(self, end: socket.socket, host: str) -> None:
    """Lets one process join, or closes the connection of a stranger."""
    try:
      link = Link(end)
      link.limit(_HANDSHAKE_S)
      connection.deliver_challenge(link, self._key)  # type: ignore[arg-type]
      connection.answer_challenge(link, self._key)  # type: ignore[arg-type]
      kind, content = link.receive()
      if kind is not Kind.HELLO:
        raise ValueError(kind)
      hello = json.loads(content)
      process, facts = int(hello['process']), dict(hello['facts'])
      link.limit(None)
      self._add(process, facts, link)
    except AuthenticationError:
      end.close()
      with self._changed:
        is_first = host not in self._refused and len(self._refused) < 64
        if is_first:
          self._refused.add(host)
      if is_first:
        self._say(
          f'Refused a connection from {host}: it does not have the '
          'key of --join_key_file.'
        )
    except Exception:  # A stranger, whatever it tried.
      end.close()
    finally:
      self._slots.release()

  def _add(self, process: int, facts: Facts, link: Link) -> None:
    with self._changed:
      known = self._links.get(process)
      if not 0 < process < self._count or (
        known is not None and not known.is_gone
      ):
        problem = f'process_id={process}: another process has it.'
      elif not self._is_open:
        problem = 'process 0 waits for nobody any more.'
      else:
        if known is not None:
          known.close()
        self._links[process] = link
        self._misfit = self._misfit or misfit(process, facts, self._facts)
        self._changed.notify()
        return
    link.send(Kind.FAULT, problem.encode())
    link.close()


def join(
  address: Address,
  process: int,
  facts: Facts,
  key: bytes,
  timeout_s: float,
  say: Say,
) -> tuple[Link, Any]:
  """Joins the first process.

  Args:
    address, facts, key, say: see `Gathering`.
    process: the number of this process.
    timeout_s: how long to try, seconds.

  Returns:
    The connection, and the JSON value that the first process tells all others.

  Raises:
    ConfigError: the first process is not there in time, does not have the key,
      or is to run something else.
  """
  hello = json.dumps({'process': process, 'facts': dict(facts)}).encode()
  begin = time.monotonic()
  next_word = begin + _SAY_AFTER_S
  while True:
    left = begin + timeout_s - time.monotonic()
    try:
      link = Link(socket.create_connection(address, max(min(left, 5.0), 0.1)))
      try:
        return link, _greet(link, hello, key, max(left, 0.0))
      except BaseException:
        link.close()
        raise
    except AuthenticationError as error:
      raise errors.ConfigError(
        f'join_key_file: process 0 at {address} has another key than process '
        f'{process}; give all of them the same file.'
      ) from error
    except errors.ConfigError:
      raise
    except (OSError, EOFError, ValueError, AssertionError) as error:
      reason = (
        getattr(error, 'strerror', None)
        or str(error)
        or ('it ended the connection')
      )
    now = time.monotonic()
    if now - begin >= timeout_s:
      raise errors.ConfigError(
        f"join_timeout_s={timeout_s:g}: process {process} can't join process "
        f'0 at coordinator_address={str(address)!r}: {reason}.'
      )
    if now >= next_word:
      next_word = now + _SAY_EVERY_S
      say(f'Process {process} waits for process 0 at {address}: {reason}.')
    time.sleep(min(_POLL_S, max(begin + timeout_s - now, 0.0)))


def _greet(link: Link, hello: bytes, key: bytes, left: float) -> Any:
  link.limit(_HANDSHAKE_S)
  connection.answer_challenge(link, key)  # type: ignore[arg-type]
  connection.deliver_challenge(link, key)  # type: ignore[arg-type]
  link.send(Kind.HELLO, hello)
  link.limit(left + _HANDSHAKE_S)  # The first process gives up before.
  kind, content = link.receive()
  if kind is Kind.FAULT:
    raise errors.ConfigError(content.decode())
  if kind is not Kind.WELCOME:
    raise EOFError
  link.limit(None)
  return json.loads(content)


def wait_until_open(address: Address, timeout_s: float) -> None:
  """Waits until something listens there.

  Raises:
    ConfigError: it can't be reached in time.
  """
  until = time.monotonic() + timeout_s
  while True:
    try:
      socket.create_connection(address, 2.0).close()
      return
    except OSError as error:
      if time.monotonic() >= until:
        raise errors.ConfigError(
          f"coordinator_address: JAX on process 0 can't be reached at "
          f'{address}: {error.strerror or error}.'
        ) from error
    time.sleep(_POLL_S)


def free_port() -> int:
  """Returns a port that nobody listens at."""
  with socket.create_server(('', 0)) as probe:
    port: int = probe.getsockname()[1]
    return port


def _listen(address: Address) -> socket.socket:
  """Listens at all addresses of this host: the named one may be a router's.

  Listens at a loopback address alone, if it is one.
  """
  if address.is_loopback:
    info = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0]
    return socket.create_server(address, family=info[0], backlog=128)
  if socket.has_dualstack_ipv6():
    return socket.create_server(
      ('', address.port),
      family=socket.AF_INET6,
      backlog=128,
      dualstack_ipv6=True,
    )
  return socket.create_server(('', address.port), backlog=128)


def _named(processes: Iterable[int]) -> str:
  numbers = [str(process) for process in processes]
  if len(numbers) == 1:
    return f'process {numbers[0]}'
  return f'processes {", ".join(numbers[:-1])} and {numbers[-1]}'
