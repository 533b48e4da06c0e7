# SPDX-License-Identifier: Apache-2.0
"""The first process's end of the connections to all others. No JAX."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import contextlib
import json
import os
import queue
import signal
import sys
import threading
import time
from typing import Any

import numpy as np

from sarathi_jax import errors
from sarathi_jax.runner import ends
from sarathi_jax.runner import joining
from sarathi_jax.runner import links as links_lib

Kind = links_lib.Kind
Link = links_lib.Link

_GOODBYE_S = 5.0  # for the others to end


class Leader(ends.End):
  """The first process's end of all connections.

  Args:
    links: the connections to the others, by process.
    exit_with: ends this process, after the `with` block.

  Attributes:
    on_fault: called once with the fault that ends all, such as a lost process,
      on a thread of its own. By default, ends this process.
    on_leaving: called with the number of a process that was told to end. By
      default, tells this process to end, too.
  """

  def __init__(
    self, links: Mapping[int, Link], exit_with: ends.Exit = ends.exit_at_once
  ) -> None:
    super().__init__(exit_with)
    self.on_fault: Callable[[errors.EngineDeadError], object] = lambda error: (
      exit_with(1, f'error: {error}')
    )
    self.on_leaving: Callable[[int], object] = _leave_too
    self._links = dict(links)
    self._inboxes: dict[int, queue.SimpleQueue[Any]] = {
      process: queue.SimpleQueue() for process in links
    }
    self._threads = [
      threading.Thread(
        target=self._watch,
        args=(process, link),
        name=f'process {process}',
        daemon=True,
      )
      for process, link in links.items()
    ]
    for thread in self._threads:
      thread.start()

  def welcome(self, told: Mapping[str, Any]) -> None:
    """Tells all others that everybody has joined.

    Args:
      told: what `joining.join` returns on the others.
    """
    for process in self._links:
      self._send(process, Kind.WELCOME, json.dumps(dict(told)).encode())

  def agree(self, facts: joining.Facts) -> None:
    """Waits until all have said that they have the same facts.

    Raises:
      ConfigError: facts differ; names them.
      EngineDeadError: a process is gone.
    """
    for process in self._links:
      problem = joining.misfit(process, self._next(process), facts)
      if problem is not None:
        raise errors.ConfigError(problem)
    for process in self._links:
      self._send(process, Kind.AGREED)

  def wait_until_warm(self) -> None:
    """Waits until all others have compiled everything.

    Raises:
      EngineDeadError: a process is gone.
    """
    for process in self._links:
      self._next(process)

  def send(self, program: int, ints: np.ndarray) -> None:
    """Tells all others what to compute next.

    Args:
      program: its number in `programs.StepPrograms`, which is a step's size.
      ints: [n] int32, the program's input.

    Raises:
      EngineDeadError: a process is gone.
    """
    message = np.concatenate([np.array([program], np.int32), ints]).tobytes()
    for process in self._links:
      self._send(process, Kind.STEP, message)

  def fail(self, error: Exception) -> None:
    """Ends all processes with an error; any thread may call it."""
    self._spread(ends.told(error), f'process 0 failed: {ends.told(error)}')

  def fail_later(self, error: BaseException) -> None:
    """Ends all processes with an error, unless its cause is known soon.

    Returns at once.
    """

    def fail() -> None:
      if not self._is_over.wait(ends.CAUSE_S):
        self._lose(f'process 0 failed: {ends.told(error)}')

    threading.Thread(target=fail, name='fault', daemon=True).start()

  def close(self, code: int = 0) -> None:
    """Lets the others end, and waits until they have ended.

    Args:
      code: the exit code of all of them.
    """
    if not self._end():
      return
    for link in self._links.values():
      with contextlib.suppress(OSError):
        link.send(Kind.GOODBYE, bytes([code % 256]))
    until = time.monotonic() + _GOODBYE_S
    for thread in self._threads:
      thread.join(max(until - time.monotonic(), 0.0))

  def end_at(self, number: int) -> None:
    """Ends all processes, for the signal of this number."""
    self.close(128 + number)
    self._exit(128 + number, '')

  def _send(self, process: int, kind: Kind, content: bytes = b'') -> None:
    try:
      self._links[process].send(kind, content)
    except OSError as error:
      raise errors.EngineDeadError(self._gone(process)) from error

  def _next(self, process: int) -> Any:
    message = self._inboxes[process].get()
    if isinstance(message, errors.SarathiError):
      raise message
    return message

  def _watch(self, process: int, link: Link) -> None:
    """Receives what a process sends, until it ends."""
    with contextlib.suppress(EOFError, OSError, ValueError):
      while True:
        kind, content = link.receive()
        if kind is Kind.FAULT:
          self._lose(f'process {process} failed: {content.decode()}')
        elif kind is Kind.LEAVING:
          self.on_leaving(process)
        else:
          self._inboxes[process].put(
            json.loads(content) if kind is Kind.FACTS else kind
          )
    self._lose(self._gone(process))

  def _lose(self, why: str) -> None:
    fault = self._spread(why, why)
    if fault is not None:
      self.on_fault(fault)

  def _spread(self, why: str, to_others: str) -> errors.EngineDeadError | None:
    """Ends all processes; returns the fault, if it is the first one."""
    fault = errors.EngineDeadError(why)
    if not self._end(fault):
      return None
    for process, link in self._links.items():
      with contextlib.suppress(OSError):
        link.send(Kind.FAULT, to_others.encode())
      self._inboxes[process].put(fault)
    return fault

  def _gone(self, process: int) -> str:
    return ends.gone(process, len(self._links) + 1)


def _leave_too(process: int) -> None:
  print(
    f'Process {process} was told to end, so all do.',
    file=sys.stderr,
    flush=True,
  )
  os.kill(os.getpid(), signal.SIGTERM)
