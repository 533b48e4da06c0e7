# SPDX-License-Identifier: Apache-2.0
"""Writes the events of a trace into files, beside the engine's thread.

A disk that is full ends the trace, with one line in the log, and nothing else.
"""

from __future__ import annotations

import json
import pathlib
import queue
import threading
import time
from typing import IO

from absl import logging

from sarathi_jax.engine import trace

_MAX_BYTES = 64 << 20  # of a file; then comes the next
_MAX_FILES = 8  # older ones are deleted
_MAX_QUEUED = 100_000  # events; more are dropped, as the disk is too slow


class TraceFile:
  """Takes events until it is closed.

  Args:
    folder: made if need be.

  Raises:
    OSError: the first file can't be made.
  """

  def __init__(self, folder: pathlib.Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    self._folder = folder
    self._events: queue.Queue[trace.Event | None] = queue.Queue(_MAX_QUEUED)
    self._num_dropped = 0
    self._number = 0
    self._file = self._open()
    self._is_broken = False
    self._thread = threading.Thread(
      target=self._run, name='trace', daemon=True)
    self._thread.start()

  def emit(self, event: trace.Event) -> None:
    """Hands an event over; never waits, never raises."""
    if self._is_broken:
      return
    try:
      self._events.put_nowait(event)
    except queue.Full:
      self._num_dropped += 1
      logging.log_every_n_seconds(
        logging.WARNING, 'The trace misses %d events: the disk is slow.', 10,
        self._num_dropped)

  def close(self, timeout_s: float = 5.0) -> None:
    """Writes what is left."""
    if not self._is_broken:
      self._events.put(None)
    self._thread.join(timeout_s)

  def _open(self) -> IO[str]:
    # A trace may lack its end: the format allows for it.
    self._number += 1
    name = f'trace-{int(time.time())}-{self._number:04d}.json'
    file = (self._folder / name).open('w')
    file.write('[\n')
    for event in trace.HEADER:
      file.write(f'{json.dumps(event)},\n')
    for old in sorted(self._folder.glob('trace-*.json'))[:-_MAX_FILES]:
      old.unlink(missing_ok=True)
    return file

  def _run(self) -> None:
    try:
      while (event := self._events.get()) is not None:
        self._file.write(f'{json.dumps(event)},\n')
        if self._events.empty():
          self._file.flush()
        if self._file.tell() > _MAX_BYTES:
          self._file.close()
          self._file = self._open()
      self._file.close()
    except OSError as error:
      self._is_broken = True
      logging.error('The trace ends: %s. Serving goes on.', error)
