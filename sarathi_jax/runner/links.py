# SPDX-License-Identifier: Apache-2.0
"""Carries messages between the processes that compute one model. No JAX.

A message is its length, four bytes, its kind, one byte, and its content.
"""

from __future__ import annotations

import contextlib
import enum
import socket
import struct
import threading
import time

_MAX_BYTES = 1 << 30  # of a message
_SEND_S = 10  # A process that takes nothing for so long counts as gone.
# A host that vanished without a word counts as gone after ten seconds.
_TCP_OPTIONS = {
  'TCP_NODELAY': 1,
  'TCP_KEEPIDLE': 3,
  'TCP_KEEPINTVL': 2,
  'TCP_KEEPCNT': 3,
  'TCP_USER_TIMEOUT': 10_000,
}


class Kind(enum.IntEnum):
  """The kind of a message; `->` is to the first process, `<-` from it."""

  HELLO = 1  # -> JSON: which process it is, and what it is to run
  WELCOME = 2  # <- JSON, what the others need to know
  FACTS = 3  # -> JSON, what must be the same on all
  AGREED = 4  # <- it is
  WARM = 5  # -> everything is compiled
  LEAVING = 6  # -> was told to end
  STEP = 7  # <- what to compute
  GOODBYE = 8  # <- end; one byte, the exit code
  FAULT = 9  # why nothing can go on


class Link:
  """A connection to one process. Any thread may send, one may receive."""

  def __init__(self, end: socket.socket) -> None:
    self._socket = end
    self._sending = threading.Lock()
    self._until: float | None = None
    end.settimeout(None)
    end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    end.setsockopt(
      socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack('@ll', _SEND_S, 0)
    )  # a timeval
    for name, value in _TCP_OPTIONS.items():
      if (option := getattr(socket, name, None)) is not None:
        end.setsockopt(socket.IPPROTO_TCP, option, value)

  def send(self, kind: Kind, content: bytes = b'') -> None:
    """Sends a message; raises OSError if the other end is gone, or stuck."""
    self.send_bytes(bytes([kind]) + content)

  def receive(self) -> tuple[Kind, bytes]:
    """Waits for the next message, and returns it.

    Raises:
      EOFError, OSError: the other end is gone.
      ValueError: what came is not a message.
    """
    message = self.recv_bytes()
    return Kind(message[0] if message else 0), message[1:]

  def limit(self, seconds: float | None) -> None:
    """Has receiving raise TimeoutError after so many seconds from now.

    None for no limit.
    """
    self._until = None if seconds is None else time.monotonic() + seconds
    self._socket.settimeout(seconds)

  @property
  def is_gone(self) -> bool:
    """Whether the other end is closed, and nothing is left to read."""
    try:
      return not self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
      return False
    except OSError:
      return True

  def close(self) -> None:
    with contextlib.suppress(OSError):
      self._socket.shutdown(socket.SHUT_RDWR)  # wakes who receives
    self._socket.close()

  # Used by multiprocessing's challenges.

  def send_bytes(self, message: bytes) -> None:
    with self._sending:
      self._socket.sendall(len(message).to_bytes(4) + message)

  def recv_bytes(self, maxlength: int = _MAX_BYTES) -> bytes:
    size = int.from_bytes(self._exactly(4))
    if size > maxlength:
      raise ValueError(f'a message of {size} bytes')
    return self._exactly(size)

  def _exactly(self, size: int) -> bytes:
    parts: list[bytes] = []
    while size:
      if self._until is not None:
        self._socket.settimeout(max(self._until - time.monotonic(), 1e-3))
      part = self._socket.recv(min(size, 1 << 20))
      if not part:
        raise EOFError
      parts.append(part)
      size -= len(part)
    return b''.join(parts)
