# SPDX-License-Identifier: Apache-2.0
"""Several processes, one model: the first leads, the others follow.

Each process has some of the mesh's devices and all run the same programs, in
the same order (`jax.distributed`). The first one schedules, and sends what
each step computes, its packed integers, to the others. It goes over TCP
connections, of which each side hears at once when the other one is gone:
collectives would wait for a lost process, some for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
from multiprocessing import connection
import os
import secrets
import socket
import sys
import threading
from typing import NoReturn

import jax
from jax.experimental import multihost_utils
import numpy as np

from sarathi_jax import errors

_KEY_BYTES = 32
_HOST_BYTES = 256
_GOODBYE = b'goodbye'


class Leader:
  """The first process's end of all connections.

  Attributes:
    on_lost: called once with an error that names the process which was lost,
      on a thread of its own. By default, ends this process.
  """

  def __init__(self, connections: dict[int, connection.Connection]) -> None:
    self.on_lost: Callable[[errors.EngineDeadError], None] = exit_at_once
    self._connections = connections
    self._lock = threading.Lock()
    self._is_over = False
    for process, end in connections.items():
      threading.Thread(
        target=self._watch, args=(process, end), name=f'process {process}',
        daemon=True).start()

  def send(self, size: int, buffers: np.ndarray) -> None:
    """Tells all others what to compute next.

    Args:
      size: of the program.
      buffers: [stages, layout.size] int32.

    Raises:
      EngineDeadError: one of them is gone.
    """
    message = np.concatenate(
      [np.array([size], np.int32), buffers.ravel()]).tobytes()
    for process, end in self._connections.items():
      try:
        end.send_bytes(message)
      except OSError as error:
        raise _lost(process) from error

  def close(self) -> None:
    """Lets the others end."""
    with self._lock:
      was_over, self._is_over = self._is_over, True
    for end in self._connections.values() if not was_over else ():
      with contextlib.suppress(OSError):
        end.send_bytes(_GOODBYE)

  def _watch(self, process: int, end: connection.Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
      end.recv_bytes()  # They never send: it ends when they are gone.
    with self._lock:
      is_first, self._is_over = not self._is_over, True
    if is_first:
      self.on_lost(_lost(process))


class Follower:
  """Another process's end."""

  def __init__(self, end: connection.Connection) -> None:
    self._end = end

  def steps(self) -> Iterator[tuple[int, np.ndarray]]:
    """What `Leader.send` is given, until `Leader.close`.

    Raises:
      EngineDeadError: the leader is gone.
    """
    while True:
      try:
        message = self._end.recv_bytes()
      except (EOFError, OSError) as error:
        raise _lost(0) from error
      if message == _GOODBYE:
        return
      step = np.frombuffer(message, np.int32)
      yield int(step[0]), step[1:]


def start(coordinator_address: str | None = None,
          num_processes: int | None = None,
          process_id: int | None = None) -> Leader | Follower | None:
  """Joins the processes; every one calls it before JAX computes anything.

  Args:
    coordinator_address, num_processes, process_id: see
      `jax.distributed.initialize`; None: detected, under SLURM, Open MPI and
      Kubernetes.

  Returns:
    This process's end; None if it is alone.

  Raises:
    ConfigError: the processes don't find each other.
  """
  try:
    jax.distributed.initialize(
      coordinator_address, num_processes, process_id,
      local_device_ids=[])  # All of this host's; by default SLURM's gives one.
  except (RuntimeError, ValueError) as error:
    raise errors.ConfigError(
      f'coordinator_address={coordinator_address!r}, '
      f'num_processes={num_processes}, process_id={process_id}: the processes '
      f'don\'t find each other: {str(error).partition(chr(10))[0]}'
    ) from error
  if jax.process_count() == 1:
    return None
  host = (coordinator_address or socket.getfqdn()).rpartition(':')[0]
  return _lead(host or socket.getfqdn()) if jax.process_index() == 0 else (
    _follow())


def _lead(host: str) -> Leader:
  key = secrets.token_bytes(_KEY_BYTES)
  with connection.Listener(
      ('0.0.0.0', 0), backlog=jax.process_count(), authkey=key) as listener:
    port: int = listener.address[1]
    _broadcast(key + port.to_bytes(4) + host.encode().ljust(_HOST_BYTES))
    connections = {}
    for _ in range(jax.process_count() - 1):
      end = listener.accept()
      connections[int.from_bytes(end.recv_bytes())] = end
  return Leader(connections)


def _follow() -> Follower:
  told = _broadcast(bytes(_KEY_BYTES + 4 + _HOST_BYTES))
  key, rest = told[:_KEY_BYTES], told[_KEY_BYTES:]
  port, host = int.from_bytes(rest[:4]), rest[4:].decode().strip()
  end = connection.Client((host, port), authkey=key)
  end.send_bytes(jax.process_index().to_bytes(4))
  return Follower(end)


def _broadcast(content: bytes) -> bytes:
  """What the first process gave; over the devices, as all are connected."""
  array = multihost_utils.broadcast_one_to_all(
    np.frombuffer(content, np.uint8))
  return np.asarray(array).astype(np.uint8).tobytes()


def smallest(number: int) -> int:
  """The smallest of the processes' numbers, on all of them."""
  if jax.process_count() == 1:
    return number
  return int(multihost_utils.process_allgather(np.int64(number)).min())


def _lost(process: int) -> errors.EngineDeadError:
  return errors.EngineDeadError(
    f'process {process} of {jax.process_count()} is gone; nothing can be '
    'computed without its devices.')


def exit_at_once(error: errors.EngineDeadError) -> NoReturn:
  """Ends this process, whatever it waits for."""
  print(f'error: {error}', file=sys.stderr, flush=True)
  os._exit(1)
