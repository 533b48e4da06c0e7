# SPDX-License-Identifier: Apache-2.0
"""A follower's end of its connection to the first process. No JAX."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import json
import queue
import threading

import numpy as np

from sarathi_jax import errors
from sarathi_jax.runner import ends
from sarathi_jax.runner import joining
from sarathi_jax.runner import links as links_lib

Kind = links_lib.Kind
Link = links_lib.Link


class Follower(ends.End):
  """The end of a process other than the first.

  Args:
    link: the connection to the first process.
    count: the number of all processes.
    exit_with: ends this process.
  """

  def __init__(
    self, link: Link, count: int, exit_with: ends.Exit = ends.exit_at_once
  ) -> None:
    super().__init__(exit_with)
    self._link = link
    self._count = count
    self._agreed = threading.Event()
    self._is_leaving = False
    self._steps: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=self._watch, name='process 0', daemon=True).start()

  def agree(self, facts: joining.Facts) -> None:
    """Waits until all others have the same facts; ends if they don't."""
    self._agreed.clear()
    self._send(Kind.FACTS, json.dumps(dict(facts)).encode())
    self._agreed.wait()

  def tell_warm(self) -> None:
    """Tells the first process that everything is compiled."""
    self._send(Kind.WARM)

  def end_at(self, number: int) -> None:
    """Asks the first process to end all, for a signal; ends at the second.

    Args:
      number: the signal's.
    """
    if self._is_leaving:
      self._exit(128 + number, '')
    self._is_leaving = True
    self._send(Kind.LEAVING)

  def steps(
    self, on_idle: Callable[[], object]
  ) -> Iterator[tuple[int, np.ndarray]]:
    """Yields what `Leader.send` is given, (program, ints), for ever.

    This process ends while it waits.

    Args:
      on_idle: called when the next one has not come yet.
    """
    while True:
      if self._steps.empty():
        on_idle()
      step = np.frombuffer(self._steps.get(), np.int32)
      yield int(step[0]), step[1:]

  def fail(self, error: Exception) -> None:
    """Tells the first process of an error; it tells all others."""
    if self._end(errors.EngineDeadError(ends.told(error))):
      self._send(Kind.FAULT, ends.told(error).encode())

  def close(self, code: int = 0) -> None:
    """Leaves the others, which can't go on without this process."""
    self.fail(errors.EngineDeadError(f'it ended with code {code}.'))

  def _send(self, kind: Kind, content: bytes = b'') -> None:
    with contextlib.suppress(OSError):  # `_watch` knows it, too.
      self._link.send(kind, content)

  def _watch(self) -> None:
    """Receives what the first process sends, and ends with it."""
    code, why = 1, ends.gone(0, self._count)
    with contextlib.suppress(EOFError, OSError, ValueError):
      while True:
        kind, content = self._link.receive()
        if kind is Kind.STEP:
          self._steps.put(content)
        elif kind is Kind.AGREED:
          self._agreed.set()
        elif kind is Kind.FAULT:
          why = content.decode()
          break
        elif kind is Kind.GOODBYE:
          code = content[0]
          why = f'process 0 ended with code {code}.'
          break
    if self._end(errors.EngineDeadError(why)):
      self._exit(code, f'error: {why}' if code else '')
