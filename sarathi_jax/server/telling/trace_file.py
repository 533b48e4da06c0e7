# SPDX-License-Identifier: Apache-2.0
"""Writes the events of a trace into files, beside the engine's thread.

Where the disk is full, events are left out and the log says so. The trace goes
on when there is room.
"""

from __future__ import annotations

from collections.abc import Iterable
import contextlib
import json
import pathlib
import queue
import time

from absl import logging

from sarathi_jax.engine import trace
from sarathi_jax.server import background
from sarathi_jax.server.telling import whole_lines

_MAX_BYTES = 64 << 20  # of a file; then comes the next
_MAX_FILES = 8  # older ones are deleted
_MAX_QUEUED = 100_000  # events; more are dropped, as the disk is too slow
_MAX_AT_ONCE = 1_000  # written


class TraceFile:
  """Takes events until it is closed.

  Args:
    folder: made if need be.

  Raises:
    OSError: the first file can't be made.

  Attributes:
    thread: the thread that writes.
  """

  def __init__(self, folder: pathlib.Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    self._folder = folder
    self._events: queue.Queue[trace.Event | None] = queue.Queue(_MAX_QUEUED)
    self._num_dropped = 0
    self._number = 0
    self._file: whole_lines.WholeLines | None = self._open()
    self.thread = background.Thread('trace', self._run)

  def emit(self, event: trace.Event) -> None:
    """Hands an event over; never waits, never raises."""
    try:
      self._events.put_nowait(event)
    except queue.Full:
      self._drop(1, 'the disk is slow')

  def close(self, timeout_s: float = 5.0) -> None:
    """Writes what is left."""
    self.thread.is_ending = True
    with contextlib.suppress(queue.Full):
      self._events.put(None, timeout=timeout_s)
    self.thread.join(timeout_s)

  def _drop(self, num_events: int, why: object) -> None:
    self._num_dropped += num_events
    logging.log_every_n_seconds(
      logging.WARNING,
      'The trace misses %d events: %s. Serving goes on.',
      10,
      self._num_dropped,
      why,
    )

  def _open(self) -> whole_lines.WholeLines:
    # A trace may lack its end: the format allows for it.
    self._number += 1
    path = self._folder / f'trace-{int(time.time())}-{self._number:04d}.json'
    file = whole_lines.WholeLines(path)
    try:
      file.write(b'[\n' + _lines(trace.HEADER))
    except OSError:
      file.close()
      path.unlink(missing_ok=True)
      raise
    for old in sorted(self._folder.glob('trace-*.json'))[:-_MAX_FILES]:
      with contextlib.suppress(OSError):
        old.unlink()
    return file

  def _run(self) -> None:
    is_open = True
    while is_open:
      events = [self._events.get()]
      while len(events) < _MAX_AT_ONCE and not self._events.empty():
        events.append(self._events.get())
      is_open = None not in events
      taken = [event for event in events if event is not None]
      try:
        self._write(_lines(taken))
      except OSError as error:
        self._drop(len(taken), error)
    if self._file is not None:
      self._file.close()

  def _write(self, lines: bytes) -> None:
    if self._file is not None and self._file.size > _MAX_BYTES:
      self._file.close()
      self._file = None
    if self._file is None:
      self._file = self._open()
    self._file.write(lines)


def _lines(events: Iterable[trace.Event]) -> bytes:
  return ''.join(f'{json.dumps(event)},\n' for event in events).encode()
