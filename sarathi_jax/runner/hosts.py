# SPDX-License-Identifier: Apache-2.0
"""Has several processes compute one model: the first leads, others follow.

Each process has some of the mesh's devices, and all run the same programs in
the same order (`jax.distributed`). The first one schedules, and sends each
step's packed integers to the others, over TCP connections of ours (`joining`,
`leader`, `follower`). Each side of these notices at once when the other is
gone, while collectives would wait for a lost process, some for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import os
import pathlib
import signal
import socket
import sys
import threading
from typing import Any

import jax
from jax._src import clusters  # It has no public name.
from jax.experimental import multihost_utils
import numpy as np

from sarathi_jax import config as config_lib
from sarathi_jax import errors
from sarathi_jax.runner import ends
from sarathi_jax.runner import follower as follower_lib
from sarathi_jax.runner import join_key
from sarathi_jax.runner import joining
from sarathi_jax.runner import leader as leader_lib

Leader = leader_lib.Leader
Follower = follower_lib.Follower

JOIN_TIMEOUT_S = 300.0
_JAX_TIMEOUT_S = 60  # for JAX's own connections, once all have joined


def start(
  coordinator_address: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  *,
  join_timeout_s: float = JOIN_TIMEOUT_S,
  join_key_file: str | None = None,
  facts: Mapping[str, Any] | None = None,
) -> Leader | Follower | None:
  """Joins the processes; each calls it before JAX computes anything.

  Args:
    coordinator_address: 'HOST:PORT' where the first process waits for the
      others.
    num_processes: how many processes there are.
    process_id: which of them this is. Any of these three may be None: it is
      then detected, under SLURM, Open MPI and Kubernetes.
    join_timeout_s: how long to wait for each other, seconds.
    join_key_file: see `join_key.read`.
    facts: name -> what must be the same on all, as JSON can hold it.

  Returns:
    This process's end; None if it is alone.

  Raises:
    ConfigError: the processes don't find each other, or their facts differ.
  """
  text, count, process = _detect(coordinator_address, num_processes, process_id)
  if count == 1:
    return None
  address = joining.parse_address(text)
  key = join_key.read(
    pathlib.Path(join_key_file).expanduser() if join_key_file else None
  )
  facts = {'num_processes': count, **(facts or {})}
  if process == 0:
    gathering = joining.Gathering(address, count, facts, key, _say)
    leader = Leader(gathering.wait(join_timeout_s))
    at_jax = joining.Address(address.host, joining.free_port())
    _on_signals(leader.end_at, signal.SIGTERM)
    with leader.starting():
      leader.welcome({'port': at_jax.port})
      _initialize(at_jax, count, process)
    return leader
  link, told = joining.join(address, process, facts, key, join_timeout_s, _say)
  at_jax = joining.Address(address.host, told['port'])
  follower = Follower(link, count)
  _on_signals(follower.end_at, signal.SIGTERM, signal.SIGINT)
  with follower.starting():
    joining.wait_until_open(at_jax, _JAX_TIMEOUT_S)
    _initialize(at_jax, count, process)
  return follower


def _detect(
  address: str | None, count: int | None, process: int | None
) -> tuple[str, int, int]:
  """Detects what is not given, from what started the processes.

  Returns:
    (address, number of processes, number of this one).
  """
  address = address or os.environ.get('JAX_COORDINATOR_ADDRESS')
  if None in (address, count, process):
    try:
      address, count, process, _ = (
        clusters.ClusterEnv.auto_detect_unset_distributed_params(
          address, count, process, [], None, _JAX_TIMEOUT_S
        )
      )
    except Exception as error:  # A cluster's own code raises what it likes.
      raise errors.ConfigError(
        "distributed: what started the processes can't be asked: "
        f'{ends.told(error)}'
      ) from error
  for name, value in (
    ('coordinator_address', address),
    ('num_processes', count),
    ('process_id', process),
  ):
    if value is None:
      raise errors.ConfigError(
        f'{name}: is not given, and neither SLURM, Open MPI nor Kubernetes '
        'says it.'
      )
  assert address is not None and count is not None and process is not None
  config_lib.check(
    0 <= process < count,
    'process_id',
    process,
    f'must be in [0, num_processes={count})',
  )
  return address, count, process


def _initialize(address: joining.Address, count: int, process: int) -> None:
  # JAX's service would handle SIGTERM itself.
  jax.config.update('jax_enable_preemption_service', False)
  try:
    jax.distributed.initialize(
      str(address),
      count,
      process,
      local_device_ids=[],  # All of this host's; by default SLURM's gives one.
      initialization_timeout=_JAX_TIMEOUT_S,
      coordinator_bind_address=str(address) if address.is_loopback else None,
    )
  except (RuntimeError, ValueError) as error:
    raise errors.ConfigError(
      f"JAX can't join {count} processes at {address}: {ends.told(error)}"
    ) from error


def _on_signals(act: Callable[[int], object], *numbers: signal.Signals) -> None:
  """Calls `act` with each signal, on a thread of its own.

  The main thread may be in a collective.
  """
  if threading.current_thread() is not threading.main_thread():
    return
  read, write = socket.socketpair()
  write.setblocking(False)
  for number in numbers:
    signal.signal(number, lambda *args: None)
  signal.set_wakeup_fd(write.fileno())

  def wait() -> None:
    while write:  # which must not be closed meanwhile
      number = read.recv(1)[0]
      if number in numbers:
        act(number)

  threading.Thread(target=wait, name='signals', daemon=True).start()


def smallest(number: int) -> int:
  """Returns the smallest of the processes' numbers, on all of them."""
  if jax.process_count() == 1:
    return number
  return int(multihost_utils.process_allgather(np.int64(number)).min())


def _say(line: str) -> None:
  print(line, file=sys.stderr, flush=True)
