# SPDX-License-Identifier: Apache-2.0
"""Where a message is read: on the event loop only if that takes no time.

Large ones wait for each other, on few threads of their own: many of them, which
one client can send, hold up nobody's prompt of usual size.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent import futures
import functools
import os
from typing import TypeVar

T = TypeVar('T')

# Messages up to this size are read at once, which takes less time than the way
# to another thread and back.
_INLINE = 1024
# Texts beyond this size take some 30 ms or more to tokenize.
_LARGE = 65_536


async def read(size: float, function: Callable[[], T]) -> T:
  """Returns what `function` does, which takes time for each of `size` bytes."""
  if size <= _INLINE:
    return function()
  return await asyncio.get_running_loop().run_in_executor(
    _threads_of_large() if size > _LARGE else None, function
  )


@functools.cache
def _threads_of_large() -> futures.ThreadPoolExecutor:
  return futures.ThreadPoolExecutor(max((os.cpu_count() or 1) // 2, 1), 'large')
