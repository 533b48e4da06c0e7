# SPDX-License-Identifier: Apache-2.0
"""Keeps Ctrl-C out of blocks that must be done as a whole."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import signal
import threading
from typing import Any


@contextlib.contextmanager
def deferred() -> Iterator[None]:
  """Defers a Ctrl-C, or a notebook's stop button, until the block is done."""
  handler = signal.getsignal(signal.SIGINT)
  if threading.current_thread() is not threading.main_thread() or not callable(
    handler
  ):
    yield
    return
  pressed: list[Any] = []
  signal.signal(signal.SIGINT, lambda *args: pressed.append(args))
  try:
    yield
  finally:
    signal.signal(signal.SIGINT, handler)
    if pressed:
      handler(*pressed[0])
