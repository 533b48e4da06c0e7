# SPDX-License-Identifier: Apache-2.0
"""Admits one thread at a time, and tells a second one of the first."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import threading
from typing import NamedTuple

from sarathi_jax import errors


class _Turn(NamedTuple):
  """A thread that is in, and what it does."""

  thread: int  # its identifier
  name: str
  what: str


class Turns:
  """Lets one thread in until it leaves; refuses others without blocking them.

  Args:
    name: of the thing that is used so, for people.
  """

  def __init__(self, name: str) -> None:
    self._name = name
    self._holder: dict[str, _Turn] = {}  # One entry, or none.

  @contextlib.contextmanager
  def take(self, what: str) -> Iterator[None]:
    """Lets this thread in for the block; it may be in already.

    Args:
      what: the name of what it is going to do.

    Raises:
      BusyError: another thread is in; nothing was done.
    """
    mine = _Turn(threading.get_ident(), threading.current_thread().name, what)
    # Unlike a lock's owner, the holder is always known, even if a Ctrl-C comes
    # right after the turn was taken.
    holder = self._holder.setdefault('turn', mine)
    if holder is not mine and holder.thread == mine.thread:
      yield
      return
    if holder is not mine:
      raise errors.BusyError(
        f'{what}, called in thread {mine.name!r}: thread {holder.name!r} is '
        f'in {holder.what} of this {self._name}, which takes one thread at a '
        'time. Nothing was done; call again when that is over.'
      )
    try:
      yield
    finally:
      self._holder.pop('turn', None)
